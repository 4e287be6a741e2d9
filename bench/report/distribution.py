"""The figure of the lower bounds: how p_lower is distributed over the images of each run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from bench.records.record import Record
from bench.report.looks import colour
from bench.report.plots import DASHES, PERCENT, Looks, figure, text
from bench.report.rows import Method
from bench.report.tables import Table

POINTS = 1000  # of a line: a run may have a million images


def p_lower(methods: Sequence[Method], looks: Looks) -> go.Figure:
    """Draw the empirical distribution of p_lower of each run, with the largest value that its votes allow.

    The runs must have counts (``Record.counted``).
    """
    lines = [(m, record) for m in methods for record in m.records]
    names = [text(_name(m, record), 40) for m, record in lines]
    largest = sorted({_largest(record) for _, record in lines})
    titles = [text(f"largest possible: {top:.6f}", 40) for top in largest]
    axis = {"title": "p_lower of the tested class", "range": [0, 1.01], "hoverformat": ".6~f"}
    title = {**PERCENT, "title": "images with at most this p_lower, %"}
    fig = figure(420, xaxis=axis, yaxis=title, legend=[*titles, *names])
    for top, name in zip(largest, titles, strict=True):
        dotted = {"color": "#777", "dash": "dot"}
        fig.add_scatter(x=[top, top], y=[0, 100], mode="lines", line=dotted, hoverinfo="skip", name=name)
    for (method, record), name in zip(lines, names, strict=True):
        look = looks[method.label]
        x, y = ecdf(record.counted.column("p_lower"))
        fig.add_scatter(
            x=[0.0, *x.tolist(), 1.0],
            y=[0.0, *(100 * y).tolist(), 100.0],
            mode="lines",
            line={"color": colour(look), "dash": DASHES[look % len(DASHES)], "shape": "hv"},
            hovertemplate="%{x}: %{y:.1f}%",
            name=name,
        )
    return fig


def _name(method: Method, record: Record) -> str:
    return method.label if len(method.records) == 1 else f"{method.name}, seed {record.identity.seed}"


def _largest(record: Record) -> float:
    """Return the largest p_lower of the record's procedure: that of an image on which all votes agree."""
    identity, n = record.identity, record.identity.procedure.n
    return identity.procedure.recompute(identity.sigma, n, n, identity.noise.tau)[0]


def ecdf(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distinct values and the share of values up to each; at most ``POINTS`` of them, evenly chosen."""
    distinct, counts = np.unique(values, return_counts=True)
    kept = np.unique(np.linspace(0, len(distinct) - 1, POINTS).round().astype(int))
    return distinct[kept], (counts.cumsum() / len(values))[kept]


def note(table: Table) -> str:
    """Explain what p_lower is of, and what it cannot show."""
    setting = table.setting
    tested = {
        "selected": "The class is the one that the votes selected, right or wrong.",
        "label": "The class is the label, so p_lower is low where the model is wrong.",
        "correct": "The class is the label; an image whose selected class is another got no votes that bound it, and "
        "is drawn at 0, a bound that always holds.",
    }[setting.target]
    meaning = (
        "Anytime runs stop once the answer is known: p_lower is what the largest radius certified of the grid needs "
        "(0: none), not an estimate of the probability. Lines rise at "
        "these values alone; the dotted line is that of the largest radius."
        if setting.grid_only
        else f"p_lower bounds the probability of a class under noise, with {setting.n:,} votes at alpha "
        f"{setting.alpha:g}. The dotted line is its value where all votes agree: no image can be to the right of it, "
        "and many images near it mean that more votes would certify larger radii."
    )
    return f"{meaning} {tested}"
