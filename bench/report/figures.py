"""Figures for papers: a column wide, readable without colour."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.io.files import replacing
from bench.records import metrics
from bench.report.attacked import budgets
from bench.report.looks import MARKERS, STYLES, colour, numbers
from bench.report.rows import Method, Setting
from bench.report.tables import Table
from bench.smoothing import bounds

MOST = 40  # rows in one figure
PANEL = 8  # curves in one panel: with more, they cannot be told from each other
WIDTH, HEIGHT = 3.4, 2.7  # inches of a panel, without the legend: a column of a two-column paper
LONGEST = 28  # characters of a label in a legend of two columns
BANDS = "bands: 95% interval"
TRADEOFF = "certified accuracy against the cost of a vote"


def curves(table: Table, out: Path, name: str) -> list[Path]:
    """Draw certified accuracy against radius with 95% interval bands; return the files written.

    The rows of the table are drawn in order, at most ``PANEL`` in each of several panels with the same axes.
    """
    rows = _drawn(table)
    panels = [rows[i : i + PANEL] for i in range(0, len(rows), PANEL)]
    fig, axes = _axes(table, [[label for label, _ in panel] for panel in panels])
    looks = numbers({label: m.name for label, m in rows})
    for ax, panel in zip(axes, panels, strict=True):
        _draw(table.setting, panel, looks, ax)
        _legend(ax, BANDS)
    return _save(fig, out, name)


def draw_curves(table: Table, ax: Any) -> int:
    """Draw the curves of a table's first ``PANEL`` rows into axes, without a legend; return their number."""
    rows = _drawn(table)
    _draw(table.setting, rows[:PANEL], numbers({label: m.name for label, m in rows}), ax)
    return len(rows[:PANEL])


def plain(text: str) -> str:
    """Return text that Matplotlib shows as it is; a pair of dollars in a name would be a formula."""
    return text.replace("$", r"\$")


def _draw(setting: Setting, rows: Sequence[tuple[str, Method]], looks: Mapping[str, int], ax: Any) -> None:
    """Draw a step line and a band for each row.

    Between two drawn radii, line and band have the values of the larger radius, where at most as much is certified.
    """
    grid = drawn_radii(setting)
    for label, method in rows:
        look, points = looks[label], metrics.pooled([r.certificates for r in method.records], grid)
        low, high = [100 * p.low for p in points], [100 * p.high for p in points]
        drawn: dict[str, Any] = {"color": colour(look), "label": plain(label), "drawstyle": "steps-pre"}
        # A line of the grid has a marker at each of its radii, another one at a few places, so that it is known by it.
        drawn |= {"marker": MARKERS[look % len(MARKERS)]}
        if not setting.grid_only:
            drawn["markevery"] = (look % 5 * len(grid) // 25, max(1, len(grid) // 5))
        ax.plot(grid, [100 * p.value for p in points], STYLES[look % len(STYLES)], **drawn)
        ax.fill_between(grid, low, high, color=colour(look), alpha=0.12, linewidth=0, step="pre")
    ax.set(xlabel="l2 radius (pixels in [0, 1])", ylabel="certified accuracy (%)", ylim=(0, 100), xlim=(0, None))


def band(table: Table, out: Path, name: str) -> list[Path]:
    """Draw certified and attacked accuracy, between which the true robust accuracy lies; none without attacks.

    A panel for each run attacked, over the images attacked. The lower edge falls just above each drawn radius, since
    what is certified at a radius is certified below it; the upper edge falls at it, since what is attacked within a
    radius is attacked within larger ones too.
    """
    shown = table.attacks.shown[:MOST]
    if not shown:
        return []
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    fig, axes = _figure(table, lines, columns, [1.25] * lines)
    names = {m.label: m.name for m in table.methods}
    looks = numbers({one.label: names.get(one.method, one.method) for one in shown})
    for place, (ax, one) in enumerate(zip(axes.flat, shown, strict=False)):
        i = looks[one.label]
        ax.plot(one.radii, one.lower, "-", color=colour(i), drawstyle="steps-pre", marker=MARKERS[i % len(MARKERS)])
        ax.plot(one.radii, one.upper, ":", color=colour(i), drawstyle="steps-post", marker=MARKERS[i % len(MARKERS)])
        ax.fill_between(*one.band, color=colour(i), alpha=0.15, linewidth=0)
        ax.set(ylim=(0, 100), xlim=(0, None), yticks=(0, 50, 100))
        ax.tick_params(labelleft=place % columns == 0, labelbottom=place + columns >= len(shown))
        ax.set_title("\n".join(textwrap.wrap(plain(one.label), 24)), fontsize=6)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    fig.supylabel("accuracy (%)", fontsize=7)
    how = "certified (solid) to attacked (dotted); more effort can only lower the upper edge"
    below = ["l2 radius (pixels in [0, 1])", *textwrap.wrap(f"{how}. {budgets(shown)}", 88)]
    fig.supxlabel("\n".join(below), fontsize=5)
    return _save(fig, out, f"{name}-attacked")


def drawn_radii(setting: Setting) -> list[float]:
    """Return the radii at which a curve has points: the grid if only it is certified, else 200 steps up to the reach.

    The steps are rounded down, so that the value shown holds at the radius shown.
    """
    if setting.grid_only:
        return setting.within or [0.0]
    places = decimals(setting.reach)
    return sorted({float(bounds.printed_radius(setting.reach * i / 200, places)) for i in range(201)})


def decimals(within: float) -> int:
    """Return the decimals at which 200 radii up to ``within`` differ."""
    return max(4, 3 - math.floor(math.log10(within))) if within > 0 else 4


def tradeoff(table: Table, out: Path, name: str) -> list[Path]:
    """Draw certified accuracy, at the lowest radius above 0, against floating point operations of a vote.

    Rows of one defense that differ in one number, such as the steps of a denoiser, and in cost are joined by a line,
    with the number beside each point.
    """
    radius = next((r for r in table.setting.within if r > 0), 0.0)
    series = _series(table)
    fig, (ax,) = _axes(table, [[one.label for one in series]])
    looks = numbers({one.label: one.label.partition(", ")[0] if one.numbers else one.label for one in series})
    free = any(not m.row.flops_per_vote for m in table.methods)  # 0 has no place on a logarithmic axis
    for one in series:
        look = looks[one.label]
        points = [metrics.pooled([r.certificates for r in m.records], [radius])[0] for m in one.methods]
        costs = [(m.row.flops_per_vote or 0.0) / 1e6 for m in one.methods]
        values = [100 * p.value for p in points]
        bars = [[100 * (p.value - p.low) for p in points], [100 * (p.high - p.value) for p in points]]
        marker = MARKERS[look % len(MARKERS)] + (STYLES[look % len(STYLES)] if len(points) > 1 else "")
        ax.errorbar(costs, values, bars, fmt=marker, color=colour(look), capsize=2, label=plain(one.label))
        for number, *place in zip(one.numbers, costs, values, strict=False):
            ax.annotate(number, place, (3, 3), textcoords="offset points", fontsize=5, color=colour(look))
    ax.set(xlabel="MFLOPs a vote", ylabel=f"certified accuracy at r = {radius:g} (%)", ylim=(0, 100))
    spent = [m.row.flops_per_vote or 0.0 for m in table.methods]
    narrow = free or max(spent) < 5 * min(spent)  # a logarithmic axis would have one tick or two
    ax.set_xscale("linear" if narrow else "log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("" if narrow else _two_and_five)
    _legend(ax, "bars: 95% interval")
    return _save(fig, out, f"{name}-cost")


def _two_and_five(x: float, place: int | None = None) -> str:
    """Label 2 and 5 of each decade: more labels would overlap."""
    return f"{x:g}" if f"{x:e}"[0] in "25" else ""


@dataclass(frozen=True)
class _Series:
    """Points of a figure that belong together, by rising cost."""

    label: str
    methods: list[Method]
    numbers: list[str]  # the setting in which they differ; empty for a row of its own


def _series(table: Table) -> list[_Series]:
    """Join the drawn rows that differ in one numeric setting and in the cost of a vote; leave the others alone."""
    rows, found, joined = _drawn(table), list[_Series](), set[int]()
    for i, (label, method) in enumerate(rows):
        if i in joined:
            continue
        series = _Series(label, [method], [])
        for key in _numeric(method):
            same = [j for j in range(i, len(rows)) if j not in joined and _but(rows[j][1], key) == _but(method, key)]
            same.sort(key=lambda j: (rows[j][1].row.flops_per_vote or 0.0, rows[j][0]))
            costs = {rows[j][1].row.flops_per_vote for j in same}
            if None not in costs and len(costs) == len(same) > len(series.methods):
                numbers = [f"{_config(rows[j][1])[key]:g}" for j in same]
                word = f"{key}={_config(method)[key]:g}"
                name = " ".join(w for w in label.split(" ") if w != word)
                series = _Series(f"{name}, {key} {', '.join(numbers)}", [rows[j][1] for j in same], numbers)
        joined |= {j for j, (_, m) in enumerate(rows) if m in series.methods}
        found.append(series)
    return found


def _config(method: Method) -> Mapping[str, Any]:
    return method.records[0].identity.defense.config


def _numeric(method: Method) -> list[str]:
    return [k for k, v in _config(method).items() if isinstance(v, int | float) and not isinstance(v, bool)]


def _but(method: Method, key: str) -> tuple[object, ...]:
    """Return what identifies a method but one numeric setting; None of an import, whose settings are unknown."""
    record = method.records[0]
    defense, config = record.identity.defense, dict(_config(method))
    known = config.pop(key, None) is not None
    others = {k: v for k, v in record.info.defense.settings.items() if k != key}
    return (
        known,
        defense.name,
        config,
        others,
        defense.objective,
        defense.arithmetic,
        record.info.defense.weights_file,
    )


def _axes(table: Table, panels: Sequence[Sequence[str]]) -> Any:
    """Make a figure with panels below each other, given the labels in each panel's legend; return it and its axes."""
    heights = [HEIGHT + 0.12 * -(-len(labels) // _columns(labels)) for labels in panels]
    fig, axes = _figure(table, len(panels), 1, heights)
    return fig, [row[0] for row in axes]


def _figure(table: Table, lines: int, columns: int, heights: Sequence[float]) -> Any:
    """Make a figure a column wide, under the table's heading; return it and its axes [lines, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "certbench"  # the same runs make the same file
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 7, "lines.linewidth": 1, "lines.markersize": 3, "axes.linewidth": 0.6})
    rows = len(table.methods)
    sizes: Any = {"figsize": (WIDTH, sum(heights)), "height_ratios": heights, "layout": "constrained"}
    fig, axes = plt.subplots(lines, columns, squeeze=False, **sizes)
    shown = f"; the first {MOST} of the table's {rows} rows" if rows > MOST else ""
    heading = "\n".join(textwrap.wrap(plain(table.setting.heading + shown), 80))
    if columns > 1:
        fig.suptitle(heading, fontsize=5)
    else:
        axes[0][0].set_title(heading, fontsize=5)
    return fig, axes


def _legend(ax: Any, title: str) -> None:
    """Place the legend below the axes, where it never hides a line."""
    columns = _columns(ax.get_legend_handles_labels()[1])
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": columns, "frameon": False}
    ax.legend(title=title, title_fontsize=6, fontsize=6, **place)


def _columns(labels: Sequence[str]) -> int:
    """Return the columns of a legend that fit a panel's width: wider ones would squeeze the axes."""
    return 2 if max(map(len, labels), default=0) <= LONGEST else 1


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


def _drawn(table: Table) -> list[tuple[str, Method]]:
    """Return the table's first rows, each with its name for the legend: the run's where two have the same."""
    names = Counter(m.name for m in table.methods)
    return [(m.row.run if names[m.name] > 1 else m.name, m) for m in table.methods[:MOST]]
