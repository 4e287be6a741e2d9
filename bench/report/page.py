"""A report as one self-contained page: curves, tables, costs, classes and images, without network access.

Python makes the data of every figure, in all views that its selectors offer; ``page.js`` shows them with Plotly, whose
source is embedded once (4.8 MB, nearly all of the page). Text of records is escaped, and the page's content security
policy keeps it from loading anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bench import __version__
from bench.errors import BenchError
from bench.records.columns import NULL
from bench.records.record import Line, Record
from bench.records.study import Study
from bench.report import attacked, distribution, gallery, plots
from bench.report.envelopes import Envelope
from bench.report.looks import numbers
from bench.report.plots import COSTS, Looks
from bench.report.rows import Method, Setting
from bench.report.shift import Shift
from bench.report.tables import Report, Table
from bench.smoothing import bounds

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"
)
PICTURES = 12  # images in a gallery, if at most 64x64 pixels; a third as many larger ones
LISTED = 10_000  # images whose numbers the page lists
NOISY = (0, 1)  # the votes whose noise is shown


@dataclass
class _Figures:
    """The figures of the page, each with its views (Plotly's data and layout), keyed by the values of its selectors."""

    views: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, title: str, views: Mapping[str, go.Figure], choices: Mapping[str, Mapping[str, str]]) -> str:
        """Add a figure and return its HTML; ``choices`` are its selectors: label -> value -> text."""
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


def page(report: Report, left_out: Sequence[str] = ()) -> str:
    """Write the whole page; ``left_out`` lists the runs that are not in it, and why."""
    sections: dict[str, list[Table]] = {}
    for table in report.tables:
        sections.setdefault(table.setting.section, []).append(table)
    figures, over_sigma = _Figures(), {e.section: e for e in report.envelopes}
    body = "".join(
        _section(f"section-{i}", tables, over_sigma.get(key), figures)
        for i, (key, tables) in enumerate(sections.items(), 1)
    )
    count = sum(len(table.runs) for table in report.tables)
    missing = "".join(f"<li>{escape(line)}</li>" for line in left_out)
    titles = [f"{_title(s[0].setting)}: {s[0].setting.terms}" for s in sections.values()]
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
<title>Certified accuracy: {count} runs</title>
<style>{css}</style>
</head>
<body>
<h1>Certified accuracy</h1>
<p>{count} finished {"run" if count == 1 else "runs"}. All runs of a section share images, base, noise, procedure, n0, n
and alpha; they differ in sigma, defense and seed. A radius is an l2 distance between images with pixels in [0, 1].
Made by certbench {__version__} from run folders.</p>
<noscript><p>Without JavaScript the page shows tables and pictures, but no figures.</p></noscript>
{f'<h2>Left out</h2><ul class="left-out">{missing}</ul>' if missing else ""}
{f"<nav><ul>{links}</ul></nav>" if len(sections) > 1 else ""}
{body}
{"".join(map(_shift, report.shifts))}
{_study(report.study) if report.study else ""}
<script>{get_plotlyjs()}</script>
<script type="application/json" id="views">{views}</script>
<script>{js}</script>
</body>
</html>
"""


def _study(study: Study) -> str:
    """Show the text of the study file, which can be copied back: a browser would drop its first line break."""
    text = escape(study.text).replace("\r", "&#13;")
    return (
        f'<details id="study"><summary>Study file {escape(study.name)}, sha256 {study.sha256}</summary>'
        f"<p>Save this text as a file and run <code>bench run FILE</code> to repeat all runs.</p><pre>\n{text}</pre>"
        "</details>"
    )


def _shift(shift: Shift) -> str:
    """Write the tables that compare test parts."""
    grids = "".join(f"<h3>{escape(title)}</h3>{_sortable(cells)}" for title, cells in shift.cells())
    return f'<section><h2>{escape(shift.title)}</h2>{grids}<p class="note">{escape(shift.note)}</p></section>'


def _section(key: str, tables: list[Table], envelope: Envelope | None, figures: _Figures) -> str:
    """Write all that can be compared: the curves of every sigma together, then a part for each sigma."""
    setting, looks = tables[0].setting, _looks(tables, envelope)
    sigmas = dict.fromkeys(f"{table.setting.sigma:g}" for table in tables)
    boxes = "".join(f'<label><input type="checkbox" value="{s}" checked> {s}</label>' for s in sigmas)
    return (
        f'<section id="{key}"><h2>{escape(_title(setting))}</h2>'
        f"<p>{escape(setting.terms)}</p>"
        + (f'<fieldset class="sigmas"><legend>sigma shown</legend>{boxes}</fieldset>' if len(sigmas) > 1 else "")
        + figures.add("Certified accuracy against radius, with 95% intervals", {"": plots.curves(tables, looks)}, {})
        + '<p class="note">Click a name in the legend to hide or show it; double-click to show it alone.</p>'
        + (_envelope(envelope, looks, figures) if envelope else "")
        + "".join(_part(table, looks, figures) for table in tables)
        + "</section>"
    )


def _looks(tables: Sequence[Table], envelope: Envelope | None) -> Looks:
    """Return the looks of a section's methods, which are the same in all of its figures."""
    named = {m.label: m.name for table in tables for m in table.methods}
    return numbers({curve.label: curve.label for curve in (envelope.curves if envelope else [])} | named)


def _title(setting: Setting) -> str:
    return setting.dataset + ("" if setting.split == "test" else f", {setting.split} images")


def _envelope(envelope: Envelope, looks: Looks, figures: _Figures) -> str:
    """Write the best-sigma curves, or what is needed to choose sigma."""
    note = f'<p class="note">{escape(envelope.note)}</p>'
    if not envelope.curves:
        return note
    return f"<h3>Best-sigma curve</h3>{_sortable(envelope.cells())}{note}" + figures.add(
        "Best-sigma curve, with 95% intervals", {"": plots.best_sigma(envelope.curves, looks)}, {}
    )


def _part(table: Table, looks: Looks, figures: _Figures) -> str:
    """Write one table and the figures, images and identities of its runs."""
    setting = table.setting
    radii = {"certified at radius": {f"{r:g}": f"{r:g}" for r in setting.within}}
    identities = "".join(_identity(m.label, r) for m in table.methods for r in m.records)
    return (
        f'<div data-sigma="{setting.sigma:g}"><h3>sigma {setting.sigma:g}</h3>'
        + (f'<p class="verdict">{escape(table.verdict)}</p>' if table.verdict else "")
        + f'{_sortable(table.few.cells)}<p class="note">{escape(f"{table.few.note} {table.notes}")}</p>'
        + f"<details><summary>All columns</summary>{_sortable(table.cells)}</details>"
        + _attacks(table, looks, figures)
        + _costs(table, looks, figures)
        + _abstention(table, looks, figures)
        + _distribution(table, looks, figures)
        + figures.add("Certified accuracy of each class", plots.by_class(table), radii)
        + '<p class="note">Percent; the number of images of each class is in brackets. Few images give wide intervals: '
        "point at a cell to see them.</p>"
        + f"<h4>Images</h4>{_gallery(table)}"
        + f"<h4>Identity and environment of every run</h4>{identities}</div>"
    )


def _attacks(table: Table, looks: Looks, figures: _Figures) -> str:
    """Write certified and attacked accuracy of the runs attacked, with the budgets; nothing without attacks."""
    shown, note = table.attacks.shown, f'<p class="note">{escape(table.attacks.note)}</p>'
    if not shown:
        return note if table.attacks else ""
    drawn = figures.add(f"{attacked.TITLE}: the true one lies between", {"": plots.attacked(shown, looks)}, {})
    return f"<h4>{attacked.TITLE}</h4>{drawn}{_sortable(attacked.cells(shown))}{note}"


def _costs(table: Table, looks: Looks, figures: _Figures) -> str:
    known = {k: t for k, t in COSTS.items() if any(getattr(m.row, k) is not None for m in table.methods)}
    if not known:
        return "<p>The costs of these runs are unknown.</p>"
    radii = {f"{r:g}": f"{r:g}" for r in table.setting.within}
    views = {f"{r:g}|{k}": plots.cost(table.methods, looks, r, k) for r in table.setting.within for k in known}
    return (
        figures.add("Certified accuracy against cost", views, {"certified at radius": radii, "cost": known})
        + '<p class="note">The line is the Pareto front of the measured values: no method beats one on it in both cost '
        "and accuracy. Bars are 95% intervals; = in the table marks methods that are not significantly different from "
        "the best.</p>"
    )


def _abstention(table: Table, looks: Looks, figures: _Figures) -> str:
    if table.setting.target == "label":
        return "<p>These runs test the known label, so they neither predict nor abstain.</p>"
    if table.setting.target == "correct":
        return "<p>How often the model abstains is not known: images of a wrong class got no votes that say so.</p>"
    views = {"": plots.abstention(table.methods, looks)}
    return figures.add("Abstained, of all images, with 95% intervals", views, {})


def _distribution(table: Table, looks: Looks, figures: _Figures) -> str:
    if table.setting.imported:
        return "<p>Released logs state radii, but no p_lower.</p>"
    views = {"": distribution.p_lower(table.methods, looks)}
    note = f'<p class="note">{escape(distribution.note(table))}</p>'
    return figures.add("Distribution of p_lower over the images", views, {}) + note


def _sortable(shown: pd.DataFrame) -> str:
    """Write a table that sorts by a click on a heading; its first column names the rows."""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button>{"<br> ".join(map(escape, lines))}</button></th>'
        for lines in (str(title).split("\n") for title in shown)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>"
        for label, *cells in shown.to_numpy().tolist()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of methods">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    """Write a cell; its second line, if it has one, is smaller. The line break ends the number that it sorts by."""
    first, _, second = text.partition("\n")
    return escape(first) + (f"\n<br><small>{escape(second)}</small>" if second else "")


def _gallery(table: Table) -> str:
    """Show images from the largest radius to errors of the first method, with the outcome of each method."""
    best = table.methods[0]
    first = best.records[0]
    try:
        split = gallery.local_split(first)
        small = math.prod(split.integers([first.certificates[0].index]).shape[2:]) <= 64 * 64
        chosen = _spread(first, PICTURES if small else PICTURES // 3)
        shown = "".join(_picture(c, table, gallery.pictures(first, split, c.index, NOISY)) for c in chosen)
    except BenchError as e:
        why = "A report downloads nothing (it sets HF_HUB_OFFLINE): the data set must be on this machine."
        return f"<p>No pictures: {escape(str(e))}. {why}</p>"
    about = (
        f"{len(chosen)} of {len(first.certificates)} images, from the largest radius of {best.label} to its errors. "
        f"Each is shown clean and with the noise of {len(NOISY)} votes of seed {first.identity.seed}, clipped to "
        "[0, 1]. For pooled seeds, the outcome of each is listed."
    )
    return f'<p class="note">{escape(about)}</p><div class="gallery">{shown}</div>'


def _spread(record: Record, count: int) -> list[Line]:
    """Choose images evenly from the largest certified radius, over abstentions, to the most certain error."""
    radius, predicted, label = (record.certificates.column(name) for name in ("radius", "predicted", "label"))
    right, wrong = predicted == label, (predicted != label) & (predicted != NULL)
    ranked = np.lexsort((np.where(right, -radius, radius), np.where(right, 0, np.where(wrong, 2, 1))))
    count = min(count, len(ranked))
    return [record.certificates[int(ranked[i * (len(ranked) - 1) // max(1, count - 1)])] for i in range(count)]


def _picture(certificate: Line, table: Table, uris: list[str]) -> str:
    index = certificate.index
    images = "".join(
        f'<img src="{uri}" alt="image {index}, {f"noisy copy {i}" if i else "clean"}">' for i, uri in enumerate(uris)
    )
    outcomes = "".join(f"<li>{escape(f'{m.label}: {_outcomes(m, index, table.setting)}')}</li>" for m in table.methods)
    caption = f"image {index}, <b>{escape(table.setting.class_name(certificate.label))}</b><ul>{outcomes}</ul>"
    return f"<figure><div>{images}</div><figcaption>{caption}</figcaption></figure>"


def _outcomes(method: Method, index: int, setting: Setting) -> str:
    outcomes = []
    nothing = "not certified" if setting.target == "label" else "abstained"
    for record in method.records:
        c = record.certificates[record.certificates.place("index", index)]
        wrong = "" if c.predicted in (None, c.label) else f"wrong ({setting.class_name(c.predicted)}), "
        radius = "no radius" if record.stopped(c) else f"radius {bounds.printed_radius(c.radius)}"
        outcomes.append(nothing if c.predicted is None else f"{wrong}{radius}")
    return "; ".join(outcomes)


def _identity(label: str, record: Record) -> str:
    """Show run.json, with each list of numbers on one line and long lists of images shortened."""
    indices, shown = record.identity.indices, record.info.as_json()
    if len(indices) > LISTED:
        few = [*indices[:3], f"... all {len(indices)} are in run.json ...", indices[-1]]
        shown["identity"]["indices"] = few
    text = json.dumps(shown, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    return f"<details><summary>{escape(label)}: {escape(record.path.name)}</summary><pre>{escape(text)}</pre></details>"
