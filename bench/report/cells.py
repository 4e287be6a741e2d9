"""The cells of one table as text, and the sentences that say what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records import paired
from bench.records.grouping import reach
from bench.records.record import Record
from bench.report.tables import level_with_best, pooled
from bench.smoothing import bounds
from bench.text import DASH


def columns(group: Sequence[Record]) -> pd.DataFrame:
    """The table of one group as text: percent with 95% intervals, a dash for what cannot be or is not known."""
    frame, radii = pooled(group), group[0].info.radii
    within, rows = reach(group[0]), frame.to_dict("records")
    shown: dict[str, list[str]] = {"defense": [label(row, frame) for row in rows]}
    for r in radii:
        key = f"certified_{r:g}"
        title = "smoothed accuracy (r = 0)" if r == 0 else f"certified at r = {r:g}"
        tied = level_with_best(group, frame, r) if r <= within else set()
        shown[title] = [
            f"{row[key]:.1%} [{row[f'{key}_low']:.1%}, {row[f'{key}_high']:.1%}]{' =' if row['run'] in tied else ''}"
            if r <= within
            else DASH
            for row in rows
        ]
    shown |= {
        "family": [v or DASH for v in frame["family"]],
        "trains": list(frame["trains"]),
        "base, clean": _numbers(frame["base_clean_accuracy"], ".1%"),
        "abstained": _numbers(frame["abstained"], ".1%"),
        "train (s)": _numbers(frame["train_seconds"], ".1f"),
        "certify (s)": _numbers(frame["certify_seconds"], ".1f"),
        "votes": _numbers(frame["votes"], ",.0f"),
        "GFLOPs / vote": _numbers(frame["flops_per_vote"], ".4g", 1e9),
        "trained here": _numbers(frame["trained_here"], ",.0f"),
        "trained elsewhere": _numbers(frame["trained_elsewhere"], ",.0f"),
        "parameters": _numbers(frame["parameters"], ",.0f"),
        "extra data": [DASH if group[0].imported else v or "no" for v in frame["extra_data"]],
        "peak memory (MB)": _numbers(frame["peak_memory"], ",.0f", 1e6),
        "ACR": _numbers(frame["acr"], ".3f"),
    }
    return pd.DataFrame(shown)


def _numbers(values: pd.Series, form: str, unit: float = 1) -> list[str]:
    """Numbers of a column, a dash for what is not known."""
    return [DASH if pd.isna(v) else format(v / unit, form) for v in values]


def limits(group: Sequence[Record]) -> str:
    """State in a few sentences what the table shows and what it cannot show."""
    record, frame = group[0], pooled(group)
    split = record.identity.split
    within = [r for r in record.info.radii if r <= reach(record)]
    widths = [frame[f"certified_{r:g}_high"] - frame[f"certified_{r:g}_low"] for r in within]
    wide = max((float(w.max()) for w in widths), default=0.0) / 2
    text = "" if split == "test" else f"These are {split} images, to choose by: no result of any defense. "
    if len(frame) > 1 and (above := [r for r in within if r > 0]):
        best = frame.iloc[int(frame[f"certified_{above[0]:g}"].argmax())]
        tied = level_with_best(group, frame, above[0])
        others = [label(row, frame) for row in frame.to_dict("records") if row["run"] in tied - {best["run"]}]
        text += (
            f"At r = {above[0]:g} {label(best, frame)} certifies the most images "
            f"({best[f'certified_{above[0]:g}']:.1%}); "
            + (
                f"not significantly worse: {', '.join(others)}. "
                if others
                else "all other rows are significantly worse. "
            )
        )
    text += f"With {frame['images'].iloc[0]:.0f} images the margin of error is up to {100 * wide:.0f} points "
    if (several := frame["seeds"] > 1).any():
        spread = max((float(frame[f"certified_{r:g}_spread"].max()) for r in within), default=0.0)
        text += (
            "(brackets: 95% Clopper-Pearson limits at the mean over seeds, conservative where seeds disagree). They "
            "and the tests cover the choice of images, for these trained models, and not the choice of seeds: seeds of "
            f"one method differ by up to {100 * spread:.1f} points. "
        )
    else:
        text += "(brackets: 95% Clopper-Pearson intervals). "
    if len(frame) > 1:
        pairs = len(frame) * (len(frame) - 1) // 2
        test = "exact sign-flip (with one seed McNemar)" if several.any() else "McNemar's exact"
        text += (
            f"=: not significantly worse than the best in that column ({test} tests on the same images, "
            f"{paired.LEVEL:.0%} level, Holm's correction over "
            + (f"all {pairs} pairs of rows; each column is corrected by itself). " if pairs > 1 else "the one pair). ")
        )
    # Rounded up, so that no certificate lies beyond what is printed.
    text += f"With these votes no image can be certified beyond r = {bounds.printed_reach(reach(record))} (a dash)."
    if record.identity.noise.kind == "grid":
        text += " Grid noise: a certificate covers every image of integer pixel values within its radius."
    if record.imported:
        text += (
            " Imported from released logs: sigma, votes and alpha are as whoever imported them states, counts are not "
            "known, images by index alone, a dash is also what a log does not say. †: it has defects, below."
        )
    elif (headless := frame["base_clean_accuracy"].isna()).any():
        text += (
            " The base was trained on other classes: with a dash under 'base, clean' the defense brought its own head"
        )
        text += "." if headless.all() else ", else a linear probe on clean images gave it one."
    if record.info.preset == "quick":
        text += " Preset quick trains briefly on a small budget: it ranks methods at that budget, not at their papers'."
    return text


def label(row: Mapping[Any, Any] | pd.Series, frame: pd.DataFrame) -> str:
    """The method's name, with its number of seeds, or its run's hash where the name alone says too little."""
    text = str(row["defense"]) + (" †" if row["flags"] else "")
    if (frame["defense"] == row["defense"]).sum() == 1:
        return text + (f" ({row['seeds']:.0f} seeds)" if row["seeds"] > 1 else "")
    seed = "" if pd.isna(row["seed"]) else f" seed {row['seed']:.0f}"
    return f"{text}{seed} ({str(row['run']).rpartition('-')[2]})"
