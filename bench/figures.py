"""Figures of run folders for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import metrics
from bench.store import Record
from bench.tables import heading, method_name, methods, pooled, reach


def figure(group: Sequence[Record], out: Path, name: str) -> list[Path]:
    """Certified accuracy against radius with 95% interval bands, as SVG and PNG; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    within = reach(group[0])
    anytime = group[0].identity["procedure"]["kind"] == "anytime"
    # An anytime radius says nothing between the radii of the grid.
    grid = [r for r in group[0].info["radii"] if r <= within] if anytime else [within * i / 200 for i in range(201)]
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    order = list(pooled(group)["run"])
    curves = sorted(methods(group), key=lambda m: order.index(m[0].path.name))
    for i, records in enumerate(curves):
        shares = [metrics.summarise(r.certificates, grid)["certified_accuracy"] for r in records]
        points = [metrics.pool(p, len(records[0].certificates)) for p in zip(*shares, strict=True)]
        alone = sum(method_name(m[0]) == method_name(records[0]) for m in curves) == 1
        label = method_name(records[0]) if alone else records[0].path.name
        values, style = [100 * p["value"] for p in points], styles[i % 4]
        (line,) = ax.plot(grid, values, style, color=colour(i), label=label, marker="o" if anytime else "")
        low, high = [100 * p["low"] for p in points], [100 * p["high"] for p in points]
        ax.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set(xlabel="l2 radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 100), xlim=(0, None))
    ax.set_title(heading(group[0]), fontsize=7)
    ax.legend(frameon=False, title="bands: 95% interval", title_fontsize=7)
    files = [out / f"{name}{suffix}" for suffix in (".svg", ".png")]
    for file in files:
        fig.savefig(file, dpi=150)
    plt.close(fig)
    return files


def colour(i: int) -> str:
    """Okabe and Ito's palette: told apart by colour-blind readers; line styles tell apart without colour."""
    return ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")[i % 7]
