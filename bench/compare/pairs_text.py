"""What ``bench compare`` found, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from bench.compare.differences import readable
from bench.compare.pairs import Comparison, Pair, PairedTest, Prediction
from bench.smoothing import bounds
from bench.text import DASH, escape

COSTS = {
    "train_seconds": "train (s)",
    "certify_seconds": "certify (s)",
    "votes": "votes",
    "flops_per_vote": "FLOPs / vote",
    "trained_here": "trained here (parameters)",
}


def markdown(found: Comparison) -> str:
    """Write the comparison as markdown."""
    runs = found.runs
    labels = [f"run {i} ({escape(run.defense)})" for i, run in enumerate(runs, 1)]
    parts = [f"## {escape(found.setting)}"]
    parts.append("\n".join(f"{i}. {escape(run.defense)}: {escape(run.run)}" for i, run in enumerate(runs, 1)))
    parts += [f"Run {i} is imported with a flag: {escape(f)}" for i, run in enumerate(runs, 1) for f in run.flags]
    if found.unknown:
        parts.append(
            f"Not stated by an imported run, so not compared: {', '.join(found.unknown)}. "
            "Images are matched by index and label."
        )
    rows = {k: [escape(readable(v)) for v in values] for k, values in found.differs.items()}
    parts.append("Settings that differ:\n\n" + _table({"setting": list(rows)} | _columns(rows, len(runs))))
    parts += [_pair_markdown(pair, labels) for pair in found.pairs]
    costs = {title: [_number(run.cost[key]) for run in runs] for key, title in COSTS.items()}
    parts.append("### Cost\n\n" + _table({"": list(costs)} | _columns(costs, len(runs))))
    parts.append(
        "Difference: second run minus first, in points, with its 95% score interval for paired proportions (Tango "
        "1998; each interval on its own, without correction). "
        "p: McNemar's exact test on the images that only one run certifies; Holm's correction is over "
        f"all {sum(len(p.radii) for p in found.pairs)} tests shown. Both are about these two trained models on "
        "images like these: nothing is averaged over seeds of training or noise."
    )
    return "\n\n".join(parts) + "\n"


def _pair_markdown(pair: Pair, labels: Sequence[str]) -> str:
    i, j = pair.first, pair.second
    text = f"### {labels[i]} against {labels[j]}\n\n{_tests(pair.radii, i + 1, j + 1)}"
    leads = [(i, j, lead) for lead in pair.first_ahead] + [(j, i, lead) for lead in pair.second_ahead]
    if leads:
        columns: dict[str, list[str]] = {
            "image": [str(lead.index) for _, _, lead in leads],
            "label": [str(lead.label) for _, _, lead in leads],
            "further": [f"run {a + 1} by {bounds.printed_radius(lead.lead)}" for a, _, lead in leads],
        }
        for k in (i, j):
            columns[f"run {k + 1}"] = [_outcome(lead.ahead if a == k else lead.behind) for a, _, lead in leads]
        text += f"\n\nImages on which they differ most:\n\n{_table(columns)}"
    ratios = [f"{COSTS[k]} x{v:.3g}" for k, v in pair.cost_ratios.items() if v is not None]
    return text + (f"\n\nCost of run {j + 1} over run {i + 1}: {', '.join(ratios)}." if ratios else "")


def _tests(tests: Sequence[PairedTest], first: int, second: int) -> str:
    return _table(
        {
            "radius": [f"{t.radius:g}" for t in tests],
            f"run {first}": [f"{t.certified_first:.1%}" for t in tests],
            f"run {second}": [f"{t.certified_second:.1%}" for t in tests],
            "difference": [f"{100 * t.difference:+.1f} [{100 * t.low:+.1f}, {100 * t.high:+.1f}]" for t in tests],
            f"only run {first}": [str(t.only_first) for t in tests],
            f"only run {second}": [str(t.only_second) for t in tests],
            "p": [f"{t.p:.2g}" for t in tests],
            "p, Holm": [f"{t.p_holm:.2g}" for t in tests],
        }
    )


def _outcome(found: Prediction) -> str:
    if found.predicted is None:
        return "abstains"
    if found.radius is None:
        return f"{found.predicted}, no radius"
    return f"{found.predicted} within {bounds.printed_radius(found.radius)}"


def _columns(rows: Mapping[str, Sequence[str]], count: int) -> dict[str, list[str]]:
    return {f"run {k + 1}": [values[k] for values in rows.values()] for k in range(count)}


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    return str(pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True))
