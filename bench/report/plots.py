"""The figures of the report page, each with the hover values, intervals and looks that the page promises.

Looks differ in colour (Okabe and Ito's palette), marker and line, so that they are told apart without colour too.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from bench.records import metrics
from bench.records.grouping import reach
from bench.records.record import Record
from bench.report.envelopes import Row
from bench.report.figures import colour, decimals, drawn_radii

SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "triangle-down", "star")
DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")
COSTS = {
    "trained_here": "parameters trained here",
    "train_seconds": "training time (s)",
    "flops_per_vote": "FLOPs per vote",
    "votes": "votes, all images",
}
STEP = "vh"  # down at a radius, then level: what lies between two radii has the larger one's value
PERCENT = {"title": "%", "range": [0, 101]}


@dataclass(frozen=True)
class Method:
    """One row of a table: its label, the runs that were pooled, and how it is drawn everywhere in its section."""

    label: str
    records: list[Record]
    row: pd.Series
    look: int

    @property
    def marker(self) -> dict[str, Any]:
        """Colour and symbol."""
        return {"color": colour(self.look), "symbol": SYMBOLS[self.look % len(SYMBOLS)], "size": 9}

    def shares(self, radii: Sequence[float], label: int | None = None) -> pd.DataFrame:
        """Certified accuracy at each radius in percent, with its interval: over all images, or those of a label."""
        return 100 * pd.DataFrame(metrics.pooled([r.certificates for r in self.records], radii, label))


def _text(words: str, width: int) -> str:
    """Words as Plotly shows them, on lines of ``width``: it reads tags, entities and %{templates} in every text."""
    return "<br>".join(escape(line, quote=False).replace("%", "&#37;") for line in wrap(words, width))


def _lines(texts: Sequence[str]) -> list[int]:
    return [text.count("<br>") + 1 for text in texts]


def _figure(height: int, *, xaxis: dict[str, Any], yaxis: dict[str, Any], legend: Sequence[str] = ()) -> go.Figure:
    """An empty figure; its ``legend`` goes below, with room for one entry above the other (a narrow screen)."""
    fig = go.Figure()
    fig.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif"},
        height=height + 10 * len(legend) + 15 * sum(_lines(legend)),
        margin={"l": 60, "r": 10, "t": 30, "b": 45},
        xaxis={"automargin": True, **xaxis},
        yaxis={"automargin": True, **yaxis},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "itemwidth": 40},
        uirevision="kept",  # what was switched off stays off in another view
    )
    return fig


def curves(parts: dict[float, list[Method]]) -> go.Figure:
    """Certified accuracy against radius: a step line and an interval band for each method of each sigma.

    Between two drawn radii, line and band are those of the larger radius, where as much is certified or less.
    """
    places = max(6, *(decimals(reach(f[0].records[0])) for f in parts.values()))
    radius = {"title": "l2 radius", "rangemode": "tozero", "hoverformat": f".{places}~f"}
    several = len(parts) > 1
    names = {
        (s, m.label): _text(f"{m.label}, sigma {s:g}" if several else m.label, 40) for s, f in parts.items() for m in f
    }
    fig = _figure(420, xaxis=radius, yaxis=PERCENT, legend=list(names.values()))
    fig.update_layout(hovermode="x unified")
    for place, (sigma, found) in enumerate(parts.items()):
        for m in found:
            grid = drawn_radii(m.records[0])
            points = m.shares(grid)
            low, high = points["low"].tolist(), points["high"].tolist()
            dash = DASHES[(place if several else m.look) % len(DASHES)]
            fixed = {"legendgroup": f"{m.label}, sigma {sigma:g}", "meta": f"{sigma:g}"}
            fig.add_scatter(
                x=[*_corners(grid), *_corners(grid)[::-1]],
                y=[*_heights(high), *_heights(low)[::-1]],
                mode="none",
                fill="toself",
                fillcolor=colour(m.look),
                opacity=0.15,
                hoverinfo="skip",
                showlegend=False,
                **fixed,
            )
            fig.add_scatter(
                x=grid,
                y=points["value"].tolist(),
                mode="lines+markers",
                line={"color": colour(m.look), "dash": dash, "shape": STEP},
                marker={**m.marker, "maxdisplayed": 8},
                customdata=list(zip(low, high, strict=True)),
                hovertemplate="%{y:.1f}% [%{customdata[0]:.1f}, %{customdata[1]:.1f}]",
                name=names[sigma, m.label],
                **fixed,
            )
    return fig


def _corners(radii: Sequence[float]) -> list[float]:
    """Radii of the corners of a step line of shape ``STEP``."""
    return [radii[0], *(r for pair in itertools.pairwise(radii) for r in pair)]


def _heights(values: Sequence[float]) -> list[float]:
    """Values at those corners."""
    return [values[0], *(v for value in values[1:] for v in (value, value))]


def envelope(rows: Sequence[tuple[Row, int]]) -> go.Figure:
    """Each method, with its look, at the sigma chosen for each radius.

    Between two radii the step line is at the larger one's value, which its sigma certifies there too.
    """
    names = [_text(row.label, 40) for row, _ in rows]
    fig = _figure(420, xaxis={"title": "l2 radius", "rangemode": "tozero"}, yaxis=PERCENT, legend=names)
    for name, (row, look) in zip(names, rows, strict=True):
        fig.add_scatter(
            x=[p.radius for p in row.points],
            y=[100 * p.value for p in row.points],
            error_y={
                "array": [100 * (p.high - p.value) for p in row.points],
                "arrayminus": [100 * (p.value - p.low) for p in row.points],
                "symmetric": False,
                "thickness": 1,
            },
            mode="lines+markers",
            line={"color": colour(look), "dash": DASHES[look % len(DASHES)], "shape": STEP},
            marker={"color": colour(look), "symbol": SYMBOLS[look % len(SYMBOLS)], "size": 9},
            customdata=[[f"{p.sigma:g}", 100 * p.low, 100 * p.high] for p in row.points],
            hovertemplate="%{y:.1f}% [%{customdata[1]:.1f}, %{customdata[2]:.1f}] at sigma %{customdata[0]}",
            name=name,
        )
    return fig


def cost(found: list[Method], radius: float, measure: str) -> go.Figure:
    """Certified accuracy at a radius against one of ``COSTS``, with the Pareto front."""
    values = [float(m.row[measure]) for m in found]
    places, axis = _cost_axis(values)
    names = [_text(m.label, 40) for m in found]
    value, low, high = (
        [100 * float(m.row[f"certified_{radius:g}{end}"]) for m in found] for end in ("", "_low", "_high")
    )
    fig = _figure(420, xaxis={"title": COSTS[measure], **axis}, yaxis=PERCENT, legend=["", *names])
    front = _front(values, value)
    fig.add_scatter(
        x=[places[i] for i in front],
        y=[value[i] for i in front],
        mode="lines",
        line={"color": "#777", "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
        name="Pareto front",
    )
    for i, m in enumerate(found):
        spent = f"{values[i]:,.1f}" if measure == "train_seconds" else f"{values[i]:,.0f}"
        fig.add_scatter(
            x=[places[i]],
            y=[value[i]],
            error_y={
                "array": [high[i] - value[i]],
                "arrayminus": [value[i] - low[i]],
                "symmetric": False,
                "thickness": 1,
            },
            mode="markers",
            marker={**m.marker, "size": 12},
            customdata=[[spent, low[i], high[i]]],
            hovertemplate="%{customdata[0]}<br>%{y:.1f}% [%{customdata[1]:.1f}, %{customdata[2]:.1f}]",
            name=names[i],
        )
    return fig


def _front(costs: list[float], values: list[float]) -> list[int]:
    """The places of those that none other beats in cost without losing in value, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[i] > values[front[-1]]:
            front.append(i)
    return front


def _cost_axis(values: list[float]) -> tuple[list[float], dict[str, Any]]:
    """Places on the axis, and the axis: of powers of ten where costs differ much, with 0 at its left end."""
    positive = [v for v in values if v > 0]
    if not positive or max(positive) < 30 * min(positive):
        most = max(values) or 1.0
        return values, {"range": [-0.04 * most, 1.06 * most], "zeroline": False}
    lowest, highest = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    ticks = {10.0**k: f"10<sup>{k}</sup>" for k in range(lowest, highest + 1)}
    if len(positive) < len(values):
        ticks = {10.0 ** (lowest - 1): "0", **ticks}
    axis = {"type": "log", "tickvals": list(ticks), "ticktext": list(ticks.values())}
    return [v if v > 0 else 10.0 ** (lowest - 1) for v in values], axis


def abstention(found: list[Method]) -> go.Figure:
    """The share of images on which each method abstains, with its interval."""
    points = [metrics.pooled_abstention([r.certificates for r in m.records]) for m in found]
    value, low, high = ([100 * getattr(p, key) for p in points] for key in ("value", "low", "high"))
    names = [_text(m.label, 18) for m in found]
    tall = max(32, 15 * max(_lines(names)) + 5)
    fig = _figure(120 + tall * len(found), xaxis=PERCENT, yaxis={"autorange": "reversed", "type": "category"})
    fig.add_bar(
        orientation="h",
        x=value,
        y=names,
        error_x={
            "array": [h - v for h, v in zip(high, value, strict=True)],
            "arrayminus": [v - b for v, b in zip(value, low, strict=True)],
            "symmetric": False,
        },
        marker={"color": [colour(m.look) for m in found]},
        customdata=list(zip(low, high, strict=True)),
        hovertemplate="%{x:.1f}% [%{customdata[0]:.1f}, %{customdata[1]:.1f}]<extra></extra>",
    )
    return fig


def by_class(found: list[Method], radii: list[float]) -> dict[str, go.Figure]:
    """Certified accuracy of each class that has images: a figure for each radius."""
    first = found[0].records[0]
    images = Counter(first.certificates.column("label").tolist())
    labels = sorted(images)
    rows = [_text(f"{first.info.classes[k]} ({images[k]})", 18) for k in labels]
    columns = [_text(m.label, 18) for m in found]
    above = max(15 * max(_lines(columns)), 7 * max(len(m.label[:18]) for m in found))  # level, or turned where narrow
    shares = [[m.shares(radii, k) for m in found] for k in labels]
    views = {}
    for i, r in enumerate(radii):
        fig = _figure(
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
