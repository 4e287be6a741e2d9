"""The columns that a table shows by default: at most eight, the radii among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bench.report.cells import numbers
from bench.report.rows import Method, Setting

MOST = 8  # columns
RADII = 5  # of these, so that the defense and two columns of costs have room


@dataclass(frozen=True)
class Columns:
    """Cells as text and a sentence about them. In a cell or a title, a second line follows a line break."""

    cells: pd.DataFrame  # a row a method
    note: str


def columns(setting: Setting, methods: Sequence[Method]) -> Columns:
    """Choose and format the default columns.

    They are the defense, certified accuracy at the lowest ``RADII`` radii within reach above its interval, the clean
    accuracy of the base and four costs. Where these are more than ``MOST``, two columns hold two costs each, one above
    the other; and where that is not enough, the clean accuracy is a sentence.
    """
    rows = [m.row for m in methods]
    radii, further = setting.within[:RADII], setting.within[RADII:]
    cells = {"defense": [m.label for m in methods]}
    cells |= {f"r = {r:g}": [_accuracy(m, r) for m in methods] for r in radii}
    clean = {"base, clean": numbers([row.base_clean_accuracy for row in rows], ".1%")}
    costs = {
        "trained here": numbers([row.trained_here for row in rows], ",.0f"),
        "GFLOPs/vote": numbers([row.flops_per_vote for row in rows], ".4g", 1e9),
        "train (s)": numbers([row.train_seconds for row in rows], ",.1f"),
        "certify (s)": numbers([row.certify_seconds for row in rows], ",.1f"),
    }
    if len(cells) + len(clean) + len(costs) > MOST:
        (a, b, c, d), note = costs, " Two costs share a column, one above the other."
        costs = {f"{upper}\n{lower}": _stack(costs[upper], costs[lower]) for upper, lower in ((a, b), (c, d))}
    else:
        note = ""
    if len(cells) + len(clean) + len(costs) > MOST:
        note += _clean(methods)
    else:
        cells |= clean
    if further:
        note += f" Further radii: {', '.join(f'{r:g}' for r in further)}."
    about = "Columns r: certified accuracy at that l2 radius, above its interval; at r = 0, images predicted right."
    return Columns(pd.DataFrame(cells | costs), f"{about}{note} All columns: --columns all.")


def _accuracy(method: Method, radius: float) -> str:
    share = method.row.certified[radius]
    mark = " =" if radius in method.level else ""
    return f"{share.value:.1%}{mark}\n{100 * share.low:.1f}-{100 * share.high:.1f}"


def _stack(upper: Sequence[str], lower: Sequence[str]) -> list[str]:
    return [f"{a}\n{b}" for a, b in zip(upper, lower, strict=True)]


def _clean(methods: Sequence[Method]) -> str:
    """State the clean accuracy of the base, which all rows share except those with a head of their own."""
    known = sorted({v for m in methods if (v := m.row.base_clean_accuracy) is not None})
    if not known:
        return ""
    return f" Clean accuracy of the base: {' to '.join(dict.fromkeys(f'{v:.1%}' for v in (known[0], known[-1])))}."
