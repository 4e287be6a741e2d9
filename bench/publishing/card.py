"""The README.md of a published folder: a model card with the tables of its runs, and metadata for the hub.

``bench publish`` writes the lines between two marks and its own metadata; all else is the user's and stays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from bench.data.datasets import card_files, load_card
from bench.data.sources import Parquet
from bench.errors import BenchError, one_line, shown
from bench.records.record import RUNS, Record
from bench.records.study import Study
from bench.report import text
from bench.report.tables import Report
from bench.text import escape

START = "<!-- certbench: bench publish writes the lines from here to the end mark again -->"
END = "<!-- certbench: end -->"
METRIC = "certified_accuracy"
TAGS = ("certbench", "image-classification", "randomized-smoothing", "certified-robustness")
FIRST = """# {name}

{start}
{end}

## License

The runs and weights derive from the data set and the base, whose licenses apply; certbench does not know them. State
the license here and as `license:` at the top.
"""
INTRO = """\
Certified accuracies by randomized smoothing: the share of images that are predicted right with a certified l2 radius of
at least r, between images with pixels in [0, 1], with its 95% interval. A certificate is wrong with probability at most
alpha for each image; it holds for the smoothed classifier, not for one call. Only rows of one table may be compared.
"""
USE = """\
Read and check them, with [certbench](https://github.com/certbench/certbench):

    bench report hub:OWNER/NAME          # or the path of a copy of this folder
    bench verify hub:OWNER/NAME          # recompute all radii, certify a sample of images again
    results = bench.load("hub:OWNER/NAME")
"""


def readme(
    name: str, report: Report, studies: Sequence[Study], weights: Sequence[str], before: str | None = None
) -> str:
    """Return the card.

    Args:
        name: Of the repository or folder.
        report: On all its runs.
        studies: Those that are published with their runs.
        weights: Names of the published entries of weights.
        before: The card as it is.

    Raises:
        BenchError: The card there has no marks, or metadata that are not YAML.
    """
    from huggingface_hub import ModelCard, ModelCardData  # 0.5 s

    if before is None:
        before = f"---\n{{}}\n---\n\n{FIRST.format(name=shown(name), start=START, end=END)}"
    head, start, rest = before.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise BenchError(
            f"README.md there was not made by bench publish; publish to another place, or add a line {START!r} and one "
            f"{END!r} where the results shall stand"
        )
    body, results = _body(report, studies, weights), _results(report)
    try:
        card = ModelCard(f"{head}{START}\n{body}{END}{tail}")
        kept: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
        others = [r for r in getattr(card.data, "eval_results", None) or () if r.metric_type != METRIC]
        kept.pop("model-index", None)
        tags = dict.fromkeys([*(kept.pop("tags", None) or ()), *TAGS])
        data = ModelCardData(**kept, tags=list(tags), model_name=name, eval_results=[*others, *results])
    except Exception as e:  # of yaml, and of the hub's library
        raise BenchError(f"README.md there has metadata that cannot be read: {one_line(e)}; correct them") from None
    return f"---\n{data.to_yaml()}\n---\n{card.text}"


def _results(report: Report) -> list[Any]:
    """Return the certified accuracies of each run as the hub's model-index has them, out of reach ones left out."""
    from huggingface_hub import EvalResult

    found = []
    for table in report.tables:
        setting = table.setting
        cards = {record.identity.card for method in table.methods for record in method.records}
        dataset, at = _dataset_id(setting.dataset, cards), f"sigma {setting.sigma:g}"
        for row in table.runs:
            for radius in setting.within:
                rate = row.certified[radius]
                found.append(
                    EvalResult(
                        task_type="image-classification",
                        task_name="certified image classification",
                        dataset_type=dataset,
                        dataset_name=setting.dataset,
                        dataset_split=setting.split,
                        metric_type=METRIC,
                        metric_name=f"certified accuracy of {row.defense} at radius {radius:g}, {at}",
                        metric_value=round(rate.value, 6),
                        metric_args={
                            **{"radius": radius, "sigma": setting.sigma, "n": setting.n, "alpha": setting.alpha},
                            **{"images": setting.images, "low": round(rate.low, 6), "high": round(rate.high, 6)},
                            **{"base": setting.base, "run": row.run},
                        },
                    )
                )
    return found


def _dataset_id(name: str, cards: Collection[str | None]) -> str:
    """Return the hub's id of a data set whose card comes with certbench, else its name: a user's may have the same."""
    card = load_card(name) if name in card_files() else None
    known = card is not None and all(one in (None, card.sha256()) for one in cards)
    return card.source.hub if card and known and isinstance(card.source, Parquet) and card.source.hub else name


def _body(report: Report, studies: Sequence[Study], weights: Sequence[str]) -> str:
    records = [record for table in report.tables for method in table.methods for record in method.records]
    parts = [INTRO, text.render(report, "md"), "## Runs\n", _runs(records)]
    parts += [
        f"The runs are of the study {escape(s.name)}, sha256 {s.sha256}, whose text is beside this file.\n"
        for s in studies
    ]
    parts.append(
        f"`weights/` has the trained weights of {len(weights)} trainings, with which `bench verify` certifies images "
        "again; they are safetensors.\n"
        if weights
        else "No weights: `bench verify` certifies images again where they are cached, or with `--deep`.\n"
    )
    parts.append(USE)
    return "\n" + "\n".join(parts) + "\n"


def _runs(records: Sequence[Record]) -> str:
    """Return a table of what identifies each run."""
    lines = ["| run | base | trained weights, sha256 | certbench |", "| --- | --- | --- | --- |"]
    for record in sorted(records, key=lambda r: r.path.name):
        base, made = record.identity.base, record.info.environment
        cells = [
            f"{RUNS}/{record.path.name}",
            f"{base.name} ({base.sha256[:8]})" if base else "not stated",
            record.identity.defense.weights or "nothing was trained",
            f"{made.certbench or 'not stated'}" + (f" ({made.commit[:12]})" if made.commit else ""),
        ]
        lines.append(f"| {' | '.join(map(escape, cells))} |")
    return "\n".join(lines) + "\n"
