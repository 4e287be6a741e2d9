"""The README.md of exported weights: what was certified, how, and on which base; all values from the record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.errors import shown
from bench.options import command
from bench.records import metrics
from bench.records.grouping import abstentions_known, method_name, reach, setting
from bench.records.record import Record

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(record: Record, library: str, use: Sequence[str]) -> str:
    """Return a model card.

    Args:
        record: The finished run whose weights are exported.
        library: Of the files, peft or timm.
        use: Lines that show how the files are loaded.
    """
    identity, info = record.identity, record.info
    base = identity.base
    assert base is not None, "an imported record has no weights"
    source = _source(info.as_json())
    found = metrics.summarise(record.certificates, info.radii)
    rows = [
        f"| {r:g} | {100 * p.value:.1f}% | {100 * p.low:.1f}% to {100 * p.high:.1f}% |"
        for r, p in zip(found.radii, found.certified_accuracy, strict=True)
        if r <= reach(record)
    ]
    beyond = [f"{r:g}" for r in found.radii if r > reach(record)]
    abstained = f"; {100 * found.abstained.value:.1f}% abstained" if abstentions_known(record) else ""
    trained_on = "trained elsewhere, under noise that was not stated"
    if not identity.defense.weights:
        trained_on = "not trained"
    elif identity.train_sigma is not None:
        trained_on = f"trained under noise of sigma {identity.train_sigma:g}"
    lines = [
        "---",
        f"library_name: {library}",
        *([f"base_model: {source['id']}"] if _HUB_ID.fullmatch(str(source.get("id"))) else []),
        "tags: [image-classification, randomized-smoothing, certified-robustness]",
        "---",
        "",
        f"# {_plain(identity.defense.name)} on {_plain(identity.dataset)}, sigma {identity.sigma:g}",
        "",
        f"A classifier of noisy images, for randomized smoothing: {_plain(method_name(record))}, {trained_on}. Its "
        f"certified accuracy holds for the smoothed classifier at sigma {identity.sigma:g}, not for a single call.",
        "",
        f"Certified: {_plain(setting(record))}. Radii are l2 distances between images with pixels in [0, 1].",
        "",
        "| radius | certified accuracy | 95% interval |",
        "|---|---|---|",
        *rows,
        "",
        *([f"Out of reach with these votes: radius {', '.join(beyond)}.", ""] if beyond else []),
        f"Average certified radius {found.acr:.3f}{abstained}.",
        "",
        "| | |",
        "|---|---|",
        f"| data set | {_plain(identity.dataset)}, card {_plain(str(identity.card))} |",
        f"| classes | {_plain(', '.join(info.classes[:20]))}{', ...' if len(info.classes) > 20 else ''} |",
        f"| base | {_plain(base.name)}, sha256 {_plain(base.sha256)} |",
        f"| base's weights | {_plain(', '.join(f'{k} {v}' for k, v in source.items() if isinstance(v, str)) or '-')} |",
        f"| trained weights | sha256 {_plain(identity.defense.weights or '-')} |",
        f"| settings | {_plain(', '.join(f'{k}={v}' for k, v in identity.defense.config.items()) or '-')} |",
        f"| seed | {identity.seed} |",
        f"| record | {_plain(record.path.absolute().name)} |",
        f"| made by | certbench {_plain(str(info.environment.certbench))} |",
        "",
        "The command of the record:",
        "",
        f"    {shown(command(info.arguments))}",
        "",
        "How to load it:",
        "",
        *(f"    {shown(line)}" for line in use),
        "",
        "License: these weights derive from the base's weights and the data set, whose licenses apply; certbench does "
        "not know them. State the license here before you publish.",
    ]
    return "\n".join(lines) + "\n"


def _source(info: dict[str, Any]) -> dict[str, Any]:
    """Return where the base's weights come from, empty where the record does not say."""
    found = (info.get("base") or {}).get("source")
    return found if isinstance(found, dict) else {}


def _plain(text: str) -> str:
    """Escape text of a record, which is untrusted, so that it cannot act as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", shown(text))
