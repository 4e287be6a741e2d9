"""The interactive figures of the report page: values with intervals on hover.

A method has one look in all figures of its section: colour (Okabe and Ito's palette), marker and line style, so that
methods differ without colour too.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from textwrap import wrap

import pandas as pd
import plotly.graph_objects as go

from bench.records import metrics
from bench.report.attacked import Attacked
from bench.report.envelopes import Curve
from bench.report.figures import decimals, drawn_radii
from bench.report.looks import colour
from bench.report.rows import Method
from bench.report.tables import Table

SYMBOLS = (
    *("circle", "square", "diamond", "cross", "triangle-up", "x", "triangle-down", "star"),
    *("pentagon", "hexagon", "triangle-left", "triangle-right", "hourglass", "bowtie", "star-diamond", "diamond-tall"),
)
DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")
COSTS = {
    "trained_here": "parameters trained here",
    "train_seconds": "training time (s)",
    "flops_per_vote": "FLOPs per vote",
    "votes": "votes, all images",
}
STEP = "vh"  # down at a radius, then level: between two radii the line has the value of the larger
_Axis = Mapping[str, object]  # Plotly's settings of an axis
PERCENT: _Axis = {"title": "%", "range": [0, 101]}


Looks = Mapping[str, int]  # a method's label -> the number of its look


def _marker(look: int, size: int = 9) -> dict[str, object]:
    return {"color": colour(look), "symbol": SYMBOLS[look % len(SYMBOLS)], "size": size}


def _shares(method: Method, radii: Sequence[float], label: int | None = None) -> pd.DataFrame:
    """Return certified accuracy in percent with its interval, a row a radius: over all images, or those of a label."""
    return 100 * pd.DataFrame(metrics.pooled([r.certificates for r in method.records], radii, label))


def text(words: str, width: int) -> str:
    """Wrap and escape text for Plotly, which reads tags, entities and %{templates} in every text."""
    return "<br>".join(escape(line, quote=False).replace("%", "&#37;") for line in wrap(words, width))


def _lines(texts: Sequence[str]) -> list[int]:
    return [text.count("<br>") + 1 for text in texts]


def figure(height: int, *, xaxis: _Axis, yaxis: _Axis, legend: Sequence[str] = ()) -> go.Figure:
    """Make an empty figure with room below for the ``legend``, one entry a line (as on a narrow screen)."""
    fig = go.Figure()
    fig.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif"},
        height=height + 10 * len(legend) + 15 * sum(_lines(legend)),
        margin={"l": 60, "r": 10, "t": 30, "b": 45},
        xaxis={"automargin": True, **xaxis},
        yaxis={"automargin": True, **yaxis},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "itemwidth": 40},
        uirevision="kept",  # a line that was switched off stays off in another view
    )
    return fig


def attacked(shown: Sequence[Attacked], looks: Looks) -> go.Figure:
    """Draw a band for each run attacked: from certified (solid) to attacked accuracy (dotted)."""
    names = [text(f"{one.label}; {one.budget}", 60) for one in shown]
    fig = figure(420, xaxis={"title": "l2 radius", "rangemode": "tozero"}, yaxis=PERCENT, legend=names)
    for name, one in zip(names, shown, strict=True):
        look, (radii, low, high) = looks[one.method], one.band
        fixed = {"legendgroup": one.label}
        _band(fig, radii, low, high, look, fixed)
        for values, shape, dash, word in (
            (one.lower, STEP, "solid", "certified"),
            (one.upper, "hv", "dot", "attacked"),
        ):
            fig.add_scatter(
                x=one.radii,
                y=values,
                mode="lines+markers",
                line={"color": colour(look), "dash": dash, "shape": shape},
                marker=_marker(look),
                hovertemplate=f"{word} %{{y:.1f}}%",
                name=name,
                showlegend=word == "certified",
                **fixed,
            )
    return fig


def _band(
    fig: go.Figure, x: Sequence[float], low: Sequence[float], high: Sequence[float], look: int, fixed: dict[str, str]
) -> None:
    """Fill the area between two lines in a method's colour."""
    fig.add_scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        mode="none",
        fill="toself",
        fillcolor=colour(look),
        opacity=0.15,
        hoverinfo="skip",
        showlegend=False,
        **fixed,
    )


def curves(tables: Sequence[Table], looks: Looks) -> go.Figure:
    """Draw certified accuracy against radius: a step line and an interval band for each method of each sigma.

    Between two drawn radii, line and band have the values of the larger radius, where at most as much is certified.
    """
    places = max(6, *(decimals(t.setting.reach) for t in tables))
    radius = {"title": "l2 radius", "rangemode": "tozero", "hoverformat": f".{places}~f"}
    several = len(tables) > 1
    names = {
        (t.setting.sigma, m.label): text(f"{m.label}, sigma {t.setting.sigma:g}" if several else m.label, 40)
        for t in tables
        for m in t.methods
    }
    fig = figure(420, xaxis=radius, yaxis=PERCENT, legend=list(names.values()))
    fig.update_layout(hovermode="x unified")
    for place, table in enumerate(tables):
        sigma, grid = table.setting.sigma, drawn_radii(table.setting)
        for m in table.methods:
            look, points = looks[m.label], _shares(m, grid)
            low, high = points["low"].tolist(), points["high"].tolist()
            dash = DASHES[(place if several else look) % len(DASHES)]
            fixed = {"legendgroup": f"{m.label}, sigma {sigma:g}", "meta": f"{sigma:g}"}
            _band(fig, _corners(grid), _heights(low), _heights(high), look, fixed)
            fig.add_scatter(
                x=grid,
                y=points["value"].tolist(),
                mode="lines+markers",
                line={"color": colour(look), "dash": dash, "shape": STEP},
                marker={**_marker(look), "maxdisplayed": 8},
                customdata=list(zip(low, high, strict=True)),
                hovertemplate="%{y:.1f}% [%{customdata[0]:.1f}, %{customdata[1]:.1f}]",
                name=names[sigma, m.label],
                **fixed,
            )
    return fig


def _corners(radii: Sequence[float]) -> list[float]:
    """Return the radii of the corners of a step line of shape ``STEP``."""
    return [radii[0], *(r for pair in itertools.pairwise(radii) for r in pair)]


def _heights(values: Sequence[float]) -> list[float]:
    """Return the values at those corners."""
    return [values[0], *(v for value in values[1:] for v in (value, value))]


def best_sigma(curves: Sequence[Curve], looks: Looks) -> go.Figure:
    """Draw each method at the sigma chosen for each radius.

    Between two radii the step line has the value of the larger, which its sigma certifies there too.
    """
    names = [text(curve.label, 40) for curve in curves]
    fig = figure(420, xaxis={"title": "l2 radius", "rangemode": "tozero"}, yaxis=PERCENT, legend=names)
    for name, curve in zip(names, curves, strict=True):
        look = looks[curve.label]
        fig.add_scatter(
            x=[p.radius for p in curve.points],
            y=[100 * p.value for p in curve.points],
            error_y=_bars([(p.value, p.low, p.high) for p in curve.points], 100) | {"thickness": 1},
            mode="lines+markers",
            line={"color": colour(look), "dash": DASHES[look % len(DASHES)], "shape": STEP},
            marker=_marker(look),
            customdata=[[f"{p.sigma:g}", 100 * p.low, 100 * p.high] for p in curve.points],
            hovertemplate="%{y:.1f}% [%{customdata[1]:.1f}, %{customdata[2]:.1f}] at sigma %{customdata[0]}",
            name=name,
        )
    return fig


def _bars(points: Sequence[tuple[float, float, float]], scale: float = 1) -> dict[str, object]:
    """Return the error bars of points (value, low, high), times ``scale``."""
    return {
        "array": [scale * (high - value) for value, _, high in points],
        "arrayminus": [scale * (value - low) for value, low, _ in points],
        "symmetric": False,
    }


def cost(methods: Sequence[Method], looks: Looks, radius: float, measure: str) -> go.Figure:
    """Draw certified accuracy at a radius against one of ``COSTS``, with the Pareto front.

    Methods whose cost is not known are left out.
    """
    known = [(m, float(spent)) for m in methods if (spent := getattr(m.row, measure)) is not None]
    costs = [spent for _, spent in known]
    places, axis = _cost_axis(costs)
    names = [text(m.label, 40) for m, _ in known]
    points = [(100 * s.value, 100 * s.low, 100 * s.high) for m, _ in known for s in [m.row.certified[radius]]]
    fig = figure(420, xaxis={"title": COSTS[measure], **axis}, yaxis=PERCENT, legend=["", *names])
    front = _front(costs, [value for value, _, _ in points])
    fig.add_scatter(
        x=[places[i] for i in front],
        y=[points[i][0] for i in front],
        mode="lines",
        line={"color": "#777", "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
        name="Pareto front",
    )
    for i, (m, spent) in enumerate(known):
        value, low, high = points[i]
        fig.add_scatter(
            x=[places[i]],
            y=[value],
            error_y=_bars([points[i]]) | {"thickness": 1},
            mode="markers",
            marker=_marker(looks[m.label], 12),
            customdata=[[f"{spent:,.1f}" if measure == "train_seconds" else f"{spent:,.0f}", low, high]],
            hovertemplate="%{customdata[0]}<br>%{y:.1f}% [%{customdata[1]:.1f}, %{customdata[2]:.1f}]",
            name=names[i],
        )
    return fig


def _front(costs: list[float], values: list[float]) -> list[int]:
    """Return the places of the points that no other beats in both cost and value, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[i] > values[front[-1]]:
            front.append(i)
    return front


def _cost_axis(values: list[float]) -> tuple[list[float], _Axis]:
    """Return the places on the axis, and the axis: logarithmic if costs differ much, with 0 at its left end."""
    positive = [v for v in values if v > 0]
    if not positive or max(positive) < 30 * min(positive):
        most = max(values, default=0.0) or 1.0
        return values, {"range": [-0.04 * most, 1.06 * most], "zeroline": False}
    lowest, highest = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    ticks = {10.0**k: f"10<sup>{k}</sup>" for k in range(lowest, highest + 1)}
    if len(positive) < len(values):
        ticks = {10.0 ** (lowest - 1): "0", **ticks}
    axis = {"type": "log", "tickvals": list(ticks), "ticktext": list(ticks.values())}
    return [v if v > 0 else 10.0 ** (lowest - 1) for v in values], axis


def abstention(methods: Sequence[Method], looks: Looks) -> go.Figure:
    """Draw the share of images on which each method abstains, with its interval."""
    shares = [metrics.pooled_abstention([r.certificates for r in m.records]) for m in methods]
    points = [(100 * s.value, 100 * s.low, 100 * s.high) for s in shares]
    names = [text(m.label, 18) for m in methods]
    tall = max(32, 15 * max(_lines(names)) + 5)
    fig = figure(120 + tall * len(methods), xaxis=PERCENT, yaxis={"autorange": "reversed", "type": "category"})
    fig.add_bar(
        orientation="h",
        x=[value for value, _, _ in points],
        y=names,
        error_x=_bars(points),
        marker={"color": [colour(looks[m.label]) for m in methods]},
        customdata=[(low, high) for _, low, high in points],
        hovertemplate="%{x:.1f}% [%{customdata[0]:.1f}, %{customdata[1]:.1f}]<extra></extra>",
    )
    return fig


def by_class(table: Table) -> dict[str, go.Figure]:
    """Draw certified accuracy of each class that has images: a figure for each radius within reach."""
    methods, radii = table.methods, table.setting.within
    images = Counter(methods[0].records[0].certificates.column("label").tolist())
    labels = sorted(images)
    rows = [text(f"{table.setting.class_name(k)} ({images[k]})", 18) for k in labels]
    columns = [text(m.label, 18) for m in methods]
    above = max(15 * max(_lines(columns)), 7 * max(len(m.label[:18]) for m in methods))  # level, or turned where narrow
    shares = [[_shares(m, radii, k) for m in methods] for k in labels]
    views = {}
    for i, r in enumerate(radii):
        fig = figure(
            60 + above + 28 * len(labels),
            xaxis={"side": "top", "type": "category"},
            yaxis={"autorange": "reversed", "type": "category"},
        )
        fig.update_layout(margin={"t": 50, "b": 10})
        fig.add_heatmap(
            x=columns,
            y=rows,
            z=[[float(s["value"][i]) for s in row] for row in shares],
            zmin=0,
            zmax=100,
            colorscale="Blues",
            showscale=False,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.0f}",
            customdata=[[[float(s["low"][i]), float(s["high"][i])] for s in row] for row in shares],
            hovertemplate="%{y}, %{x}<br>%{z:.1f}% [%{customdata[0]:.1f}, %{customdata[1]:.1f}]<extra></extra>",
        )
        views[f"{r:g}"] = fig
    return views
