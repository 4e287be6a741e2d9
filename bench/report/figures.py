"""Figures of run folders for papers: a column wide, for colour-blind readers and for print without colour."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.io.files import replacing
from bench.records import metrics
from bench.records.grouping import heading, method_name, methods, reach
from bench.records.record import Record
from bench.report.tables import pooled
from bench.smoothing import bounds

# Okabe and Ito's palette, told apart by colour-blind readers; line styles and markers tell apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*<>"
MOST = 20  # rows in one figure: of more neither the lines nor the legend can be read
WIDTH, HEIGHT = 3.4, 2.7  # inches, the legend not counted: a column of a two-column paper
TRADEOFF = "certified accuracy against the cost of a vote"


def curves(group: Sequence[Record], out: Path, name: str) -> list[Path]:
    """Draw certified accuracy against radius with 95% interval bands; return the files written.

    Between two drawn radii, line and band are those of the larger radius, where as much is certified or less.
    """
    anytime, grid = group[0].identity.sampling.on_grid, drawn_radii(group[0])
    fig, ax = _axes(group)
    for i, (label, records) in enumerate(_ordered(group)):
        points = metrics.pooled([r.certificates for r in records], grid)
        values, marker = [100 * p.value for p in points], MARKERS[i % len(MARKERS)] if anytime else ""
        (line,) = ax.plot(
            grid, values, STYLES[i % 4], color=colour(i), label=label, marker=marker, drawstyle="steps-pre"
        )
        low, high = [100 * p.low for p in points], [100 * p.high for p in points]
        ax.fill_between(grid, low, high, color=line.get_color(), alpha=0.12, linewidth=0, step="pre")
    ax.set(xlabel="l2 radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 100), xlim=(0, None))
    _legend(ax, "bands: 95% interval")
    return _save(fig, out, name)


def drawn_radii(record: Record) -> list[float]:
    """Radii at which a curve has points: the grid of a procedure that certifies no others, else many within reach.

    Those many are rounded down, so that hovering over a point shows a radius at which its value holds.
    """
    within = reach(record)
    if record.identity.sampling.on_grid:
        return [r for r in record.info.radii if r <= within] or [0.0]
    return sorted({float(bounds.printed_radius(within * i / 200, decimals(within))) for i in range(201)})


def decimals(within: float) -> int:
    """Decimals that tell 200 radii up to ``within`` apart."""
    return max(4, 3 - math.floor(math.log10(within))) if within > 0 else 4


def tradeoff(group: Sequence[Record], out: Path, name: str) -> list[Path]:
    """Certified accuracy, at the grid's lowest radius above 0, against floating point operations of a vote."""
    radius = next((r for r in group[0].info.radii if 0 < r <= reach(group[0])), 0.0)
    fig, ax = _axes(group)
    free = any(not r.cost.flops_per_vote for r in group)  # no place for it on a logarithmic axis
    for i, (label, records) in enumerate(_ordered(group)):
        (p,) = metrics.pooled([r.certificates for r in records], [radius])
        cost = (records[0].cost.flops_per_vote or 0.0) / 1e6
        bars = [[100 * (p.value - p.low)], [100 * (p.high - p.value)]]
        marker = MARKERS[i % len(MARKERS)]
        ax.errorbar([cost], [100 * p.value], bars, fmt=marker, color=colour(i), capsize=2, label=label)
    ax.set(xlabel="MFLOPs a vote", ylabel=f"certified accuracy at r = {radius:g} (%)", ylim=(0, 100))
    ax.set_xscale("linear" if free else "log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("" if free else "{x:g}")
    _legend(ax, "bars: 95% interval")
    return _save(fig, out, f"{name}-cost")


def _axes(group: Sequence[Record]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "certbench"  # the same runs make the same file
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 7, "lines.linewidth": 1, "lines.markersize": 3, "axes.linewidth": 0.6})
    rows = len(methods(group))
    fig, ax = plt.subplots(figsize=(WIDTH, HEIGHT + 0.12 * -(-min(rows, MOST) // 2)), layout="constrained")
    shown = f"; the first {MOST} of the table's {rows} rows" if rows > MOST else ""
    ax.set_title("\n".join(textwrap.wrap(heading(group[0]) + shown, 80)), fontsize=5)
    return fig, ax


def _legend(ax: Any, title: str) -> None:
    """Below the axes, where it never hides a line."""
    ax.figure.legend(loc="outside lower center", ncols=2, frameon=False, title=title, title_fontsize=6, fontsize=6)


def _save(fig: Any, out: Path, name: str) -> list[Path]:
    from matplotlib import pyplot as plt

    files = [out / f"{name}{suffix}" for suffix in (".svg", ".png", ".pdf")]
    for file in files:
        # No dates, so that the same runs make the same files.
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix)
        with replacing(file) as partial:
            fig.savefig(partial, dpi=300, metadata=metadata)
    plt.close(fig)
    return files


def _ordered(group: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The table's first rows: a name for the legend, the run's where another row has the same, and their runs."""
    rows = {m[0].path.name: m for m in methods(group)}
    names = Counter(method_name(m[0]) for m in rows.values())
    labels = {run: name if names[name := method_name(m[0])] == 1 else run for run, m in rows.items()}
    return [(labels[run], rows[run]) for run in pooled(group)["run"][:MOST]]


def colour(i: int) -> str:
    """The i-th method's, in a figure or on a page."""
    return COLOURS[i % len(COLOURS)]
