"""One self-contained page of run folders: curves, tables, costs, classes and images, in a file that needs no network.

Python makes every figure's data, in all the views its selectors offer; ``page.js`` shows them with
Plotly, whose whole source is embedded once (4.8 MB, nearly all of the page). All that comes from a
record is escaped, and the page's content security policy keeps it from loading anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bench import __version__
from bench.errors import BenchError
from bench.io.files import digest
from bench.records import metrics
from bench.records.grouping import common, comparable_but_sigma, groups, methods, reach
from bench.records.record import Line, Record
from bench.report import envelopes, gallery, plots
from bench.report.cells import columns, limits
from bench.report.envelopes import Envelope
from bench.report.plots import COSTS, Method
from bench.report.tables import pooled
from bench.smoothing import bounds

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"
)
PICTURES = 12  # images in a gallery, of at most 64x64 pixels; a third as many of larger ones
LISTED = 10_000  # images whose numbers the page lists
NOISY = (0, 1)  # the votes whose noise is shown


@dataclass
class _Figures:
    """The figures of the page: for each its views, keyed by the values of its selectors."""

    views: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, title: str, views: Mapping[str, go.Figure], choices: Mapping[str, Mapping[str, str]]) -> str:
        """The figure's HTML; ``choices`` are its selectors: label -> value -> text."""
        key = f"figure-{len(self.views) + 1}"
        self.views[key] = {k: v.to_plotly_json() for k, v in views.items()}
        selects = "".join(
            f"<label>{escape(label)} <select>"
            + "".join(f'<option value="{escape(v)}">{escape(t)}</option>' for v, t in texts.items())
            + "</select></label>"
            for label, texts in choices.items()
        )
        return (
            f'<figure data-plot="{key}"><figcaption>{escape(title)}</figcaption>{selects}'
            f'<div class="plot" role="group" aria-label="{escape(title)}"></div></figure>'
        )


def page(records: Sequence[Record], left_out: Sequence[str] = ()) -> str:
    """The whole page; ``left_out`` says which runs are not in it, and why."""
    sections: dict[str, list[list[Record]]] = {}
    for group in groups(records):
        sections.setdefault(digest(comparable_but_sigma(group[0])), []).append(group)
    figures, over_sigma = _Figures(), {digest(comparable_but_sigma(e.record)): e for e in envelopes.find(records)}
    body = "".join(
        _section(f"section-{i}", s, over_sigma.get(key), figures) for i, (key, s) in enumerate(sections.items(), 1)
    )
    missing = "".join(f"<li>{escape(line)}</li>" for line in left_out)
    titles = [f"{_title(s[0][0])}: {common(s[0][0])}" for s in sections.values()]
    links = "".join(f'<li><a href="#section-{i}">{escape(t)}</a></li>' for i, t in enumerate(titles, 1))
    # "<" would end the script block where a name holds "</script>".
    views = json.dumps(figures.views, allow_nan=False).replace("<", "\\u003c")
    css, js = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Certified accuracy: {len(records)} runs</title>
<style>{css}</style>
</head>
<body>
<h1>Certified accuracy</h1>
<p>{len(records)} finished {"run" if len(records) == 1 else "runs"}. A section holds only runs on the same images, base,
noise, procedure, n0, n and alpha; within one, runs differ in their sigma, their defense and its seed. A radius is an l2
distance between images with pixels in [0, 1]. Made by certbench {__version__} from run folders alone.</p>
<noscript><p>Without JavaScript there are the tables and pictures, but no figures.</p></noscript>
{f'<h2>Left out</h2><ul class="left-out">{missing}</ul>' if missing else ""}
{f"<nav><ul>{links}</ul></nav>" if len(sections) > 1 else ""}
{body}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="views">{views}</script>
<script>{js}</script>
</body>
</html>
"""


def _section(key: str, tables: list[list[Record]], over_sigma: Envelope | None, figures: _Figures) -> str:
    """All that can be compared, of every sigma: curves together, then a part for each sigma."""
    looks: dict[str, int] = {}
    parts: dict[float, list[Method]] = {}
    for group in tables:
        frame, labels = pooled(group), columns(group)["defense"]
        runs = {m[0].path.name: m for m in methods(group)}
        parts[group[0].identity.sigma] = [
            Method(label, runs[row["run"]], row, looks.setdefault(label, len(looks)))
            for label, (_, row) in zip(labels, frame.iterrows(), strict=True)
        ]
    boxes = "".join(f'<label><input type="checkbox" value="{s:g}" checked> {s:g}</label>' for s in parts)
    return (
        f'<section id="{key}"><h2>{escape(_title(tables[0][0]))}</h2>'
        f"<p>{escape(common(tables[0][0]))}</p>"
        + (f'<fieldset class="sigmas"><legend>sigma shown</legend>{boxes}</fieldset>' if len(parts) > 1 else "")
        + figures.add("Certified accuracy against radius, with 95% intervals", {"": plots.curves(parts)}, {})
        + '<p class="note">A click on a name in the legend hides or shows it, two clicks show it alone.</p>'
        + (_envelope(over_sigma, looks, figures) if over_sigma else "")
        + "".join(_part(group, found, figures) for group, found in zip(tables, parts.values(), strict=True))
        + "</section>"
    )


def _title(record: Record) -> str:
    split = record.identity.split
    return record.identity.dataset + ("" if split == "test" else f", {split} images")


def _envelope(found: Envelope, looks: dict[str, int], figures: _Figures) -> str:
    """The best sigma of each radius where it was chosen on validation images, else how to get there."""
    note = f'<p class="note">{escape(found.note)}</p>'
    if not found.rows:
        return note
    drawn = [(row, looks.setdefault(row.label, len(looks))) for row in found.rows]
    return f"<h3>Envelope over sigma</h3>{_sortable(envelopes.columns(found))}{note}" + figures.add(
        "Envelope over sigma, with 95% intervals", {"": plots.envelope(drawn)}, {}
    )


def _part(group: list[Record], found: list[Method], figures: _Figures) -> str:
    """One table and all that belongs to it."""
    sigma, within = group[0].identity.sigma, [r for r in group[0].info.radii if r <= reach(group[0])]
    radii = {"certified at radius": {f"{r:g}": f"{r:g}" for r in within}}
    costs = {f"{r:g}|{cost}": plots.cost(found, r, cost) for r in within for cost in COSTS}
    named = "".join(_identity(m.label, r) for m in found for r in m.records)
    return (
        f'<div data-sigma="{sigma:g}"><h3>sigma {sigma:g}</h3>{_sortable(columns(group))}'
        f'<p class="note">{escape(limits(group))}</p>'
        + figures.add("Certified accuracy against cost", costs, radii | {"cost": COSTS})
        + '<p class="note">The line is the Pareto front of the measured values: no method on it is beaten in both. '
        "Bars are 95% intervals; which methods differ significantly is marked in the table (=).</p>"
        + _abstention(found, figures)
        + figures.add("Certified accuracy of each class", plots.by_class(found, within), radii)
        + '<p class="note">Percent; in brackets the number of images of the class. Few images, wide intervals: '
        "see them by pointing at a cell.</p>"
        + f"<h4>Images</h4>{_gallery(found)}"
        + f"<h4>Identity and environment of every run</h4>{named}</div>"
    )


def _abstention(found: list[Method], figures: _Figures) -> str:
    if any(pd.isna(m.row["abstained"]) for m in found):
        return "<p>These runs test the known label, so they neither predict nor abstain.</p>"
    return figures.add("Abstained, of all images, with 95% intervals", {"": plots.abstention(found)}, {})


def _sortable(shown: pd.DataFrame) -> str:
    """A table whose columns sort, its first the name of each row."""
    head = "".join(f'<th scope="col" aria-sort="none"><button>{escape(t)}</button></th>' for t in map(str, shown))
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for label, *cells in shown.to_numpy().tolist()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of methods">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _gallery(found: list[Method]) -> str:
    """Images from the largest radius to errors, by the first method, with what each method made of them."""
    first = found[0].records[0]
    try:
        split = gallery.data_at_hand(first)
        small = math.prod(split.integers([first.certificates[0].index]).shape[2:]) <= 64 * 64
        chosen = _spread(first, PICTURES if small else PICTURES // 3)
        shown = "".join(_picture(c, found, gallery.pictures(first, split, c.index, NOISY)) for c in chosen)
    except BenchError as e:
        why = "they are shown where the data are at hand; a report sets HF_HUB_OFFLINE and downloads nothing"
        return f"<p>No pictures: {why}. Here: {escape(str(e))}.</p>"
    about = (
        f"{len(chosen)} of {len(first.certificates)} images, from the largest radius to errors by {found[0].label}: "
        f"each clean and with the noise of {len(NOISY)} votes of seed {first.identity.seed}, clipped to be shown. "
        "Where seeds were pooled, the outcome of each is given."
    )
    return f'<p class="note">{escape(about)}</p><div class="gallery">{shown}</div>'


def _spread(record: Record, count: int) -> list[Line]:
    """So many images, evenly from the largest certified radius, over abstentions, to the most certain error."""
    radius = record.certificates.column("radius")
    ranked = np.where(metrics.earned(record.certificates) >= 0, -radius, radius).argsort(kind="stable")
    count = min(count, len(ranked))
    return [record.certificates[int(ranked[i * (len(ranked) - 1) // max(1, count - 1)])] for i in range(count)]


def _picture(certificate: Line, found: list[Method], uris: list[str]) -> str:
    index, names = certificate.index, found[0].records[0].info.classes
    images = "".join(
        f'<img src="{uri}" alt="image {index}, {f"noisy copy {i}" if i else "clean"}">' for i, uri in enumerate(uris)
    )
    told = "".join(f"<li>{escape(f'{m.label}: {_outcomes(m, index)}')}</li>" for m in found)
    caption = f"image {index}, <b>{escape(str(names[certificate.label]))}</b><ul>{told}</ul>"
    return f"<figure><div>{images}</div><figcaption>{caption}</figcaption></figure>"


def _outcomes(method: Method, index: int) -> str:
    said = []
    nothing = "not certified" if pd.isna(method.row["abstained"]) else "abstained"
    for record in method.records:
        c = record.certificates[record.certificates.place("index", index)]
        wrong = "" if c.predicted in (None, c.label) else f"wrong ({record.info.classes[c.predicted]}), "
        said.append(nothing if c.predicted is None else f"{wrong}radius {bounds.printed_radius(c.radius)}")
    return "; ".join(said)


def _identity(label: str, record: Record) -> str:
    """All that run.json says, lists of numbers on one line, of very many images the first and last."""
    indices, shown = record.identity.indices, record.info.as_json()
    if len(indices) > LISTED:
        few = [*indices[:3], f"... all {len(indices)} are in run.json ...", indices[-1]]
        shown = shown | {"identity": record.identity.as_json() | {"indices": few}}
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    return f"<details><summary>{escape(label)}: {escape(record.path.name)}</summary><pre>{escape(text)}</pre></details>"
