"""The page of ``bench inspect``: numbers with their definitions, and pictures; self-contained and without scripts."""

from __future__ import annotations

from html import escape
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from bench import __version__
from bench.inspection import pictures
from bench.inspection.copies import SEED, Copies
from bench.inspection.landscape import POINTS, REACH, Landscape
from bench.inspection.measure import DRAWS, Inspection, SubjectResult
from bench.inspection.numbers import NUMBERS, printed
from bench.report.gallery import data_uri
from bench.smoothing import bounds

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
NOISY = 2  # noisy copies that are shown
Cells = list[list[str]]


def page(found: Inspection) -> str:
    """Write the whole page."""
    identity = found.results[0].subject.record.identity
    names = ("bench.report", "bench.inspection")
    css = "".join(resources.files(name).joinpath("page.css").read_text(encoding="utf-8") for name in names)
    count, images = len(found.results), len(found.copies)
    terms = f"{identity.dataset}, {identity.split} images, sigma {identity.sigma:g}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Inspected: {count} runs of {escape(identity.dataset)}</title>
<style>{css}</style>
</head>
<body>
<h1>Inside {count} {"run" if count == 1 else "runs"}</h1>
<p>{escape(terms)}. All runs see the same {images} {"image" if images == 1 else "images"}, each with the same {DRAWS}
noisy copies and the same random directions (seed {SEED}). Nothing here is certified: the numbers describe the base
function at noisy copies, not the smoothed classifier's vote. Made by certbench {__version__}.</p>
{_runs(found)}
<h2>Numbers</h2>
{_numbers(found)}
<h2>Where the runs look: Grad-CAM</h2>
{_cams(found)}
<h2>Loss around the images</h2>
{_landscapes(found)}
</body>
</html>
"""


def _runs(found: Inspection) -> str:
    rows = [
        [escape(r.subject.label), escape(r.subject.record.path.name), escape(_layer(r)), escape(_remarks(r))]
        for r in found.results
    ]
    return _table(["run", "folder", "layer of the Grad-CAM", "remarks"], rows, "Runs")


def _layer(result: SubjectResult) -> str:
    if result.grid is None:
        return "—"
    return f"{result.layer}, {result.grid[0]}x{result.grid[1]} positions"


def _remarks(result: SubjectResult) -> str:
    remarks = []
    if result.no_map:
        remarks.append(f"no Grad-CAM: {result.no_map}")
    if result.behind:
        remarks.append("its maps are of the classifier behind its change of the pixels, with respect to those pixels")
    if words := result.subject.run.plan.arithmetic:
        remarks.append(f"certified in {', '.join(words)}, inspected in float32")
    return "; ".join(remarks)


def _numbers(found: Inspection) -> str:
    rows = [[escape(r.subject.label), *(escape(printed(r.summary(n))) for n in NUMBERS)] for r in found.results]
    images = len(found.copies)
    missing = [
        f"{r.subject.label}, {n.title}: {r.summary(n).images} of {images} images"
        for r in found.results
        for n in NUMBERS
        if r.summary(n).images < images
    ]
    note = (
        f"Mean over {images} images, each the mean over its {DRAWS} noisy copies, seed {SEED}, with a 95% t interval "
        "over images within the number's range (of the ratio: a jackknife t interval of its logarithm). It "
        "is for the mean over all such images. Runs share images, so whether two intervals overlap does not decide "
        "whether the runs differ. The denoiser D is "
        f"{found.denoiser}."
    )
    left = f"Not defined for some images, which are left out: {'; '.join(missing)}." if missing else ""
    defined = "".join(
        f"<dt>{escape(n.title)}</dt><dd>{escape(n.definition)} <small>Source: {escape(n.source)}.</small></dd>"
        for n in NUMBERS
    )
    table = _table(["run", *(n.title for n in NUMBERS)], rows, "Numbers")
    return f'{table}<p class="note">{escape(note)} {escape(left)}</p><dl>{defined}</dl>'


def _cams(found: Inspection) -> str:
    about = (
        f"Maps of the label's logit for {len(found.pictured)} of {len(found.copies)} images, on the clean image and "
        f"on {NOISY} of its {DRAWS} noisy copies (seed {SEED}, shown clipped to [0, 1]). Each map is scaled to its own "
        "range, so colours compare places within a map, not strengths between maps. A map without colour is empty: "
        "nothing in that layer speaks for the label."
    )
    legend = f'<img src="{pictures.scale()}" alt="colours from low to high" style="width:12rem;height:.8rem">'
    shown = "".join(_cam(found, place) for place in found.pictured)
    return f'<p class="note">{escape(about)} low {legend} high</p>{shown}'


def _cam(found: Inspection, place: int) -> str:
    copies = found.copies[place]
    views = _pixels(copies)
    what = ["clean", *(f"noisy copy {i}" for i in range(1, NOISY + 1))]
    rows = [["image", *(_img(data_uri(v), f"image {copies.index}, {w}") for v, w in zip(views, what, strict=True)), ""]]
    for result in found.results:
        maps = result.images[place].maps
        cells = [
            _img(pictures.overlay(v, m), f"{result.subject.label}, {w}")
            for v, m, w in zip(views, maps, what, strict=False)
        ] or ["—"] * len(views)
        rows.append([escape(result.subject.label), *cells, escape(_outcome(result, copies))])
    return f"<h3>{escape(_title(found, copies))}</h3>" + _table(
        ["", *what, "certified"], rows, f"Maps of image {copies.index}"
    )


def _pixels(copies: Copies) -> list[NDArray[np.float32]]:
    return [copies.clean.cpu().numpy(), *copies.noisy[:NOISY].cpu().numpy()]


def _outcome(result: SubjectResult, copies: Copies) -> str:
    """Return what the run certified on the image."""
    record = result.subject.record
    line = record.certificates[record.certificates.place("index", copies.index)]
    if line.predicted is None:
        return "abstained"
    radius = "" if record.stopped(line) else f"radius {bounds.printed_radius(line.radius)}"
    wrong = "" if line.predicted == line.label else f"wrong: {_class(result, line.predicted)}"
    return ", ".join(filter(None, (wrong, radius)))


def _class(result: SubjectResult, label: int) -> str:
    names = result.subject.record.info.classes
    return names[label] if label < len(names) else str(label)


def _title(found: Inspection, copies: Copies) -> str:
    return f"image {copies.index}: {_class(found.results[0], copies.label)}"


def _landscapes(found: Inspection) -> str:
    sigma = found.copies[0].sigma
    about = (
        f"Mean cross-entropy of the label over {DRAWS} noisy copies (seed {SEED}) on {POINTS}x{POINTS} points around "
        f"the image (+), from -{REACH:g} to {REACH:g} sigma, {REACH * sigma:g} in l2: along the run's own gradient of "
        "that loss, and along one random direction, the same for all runs but for its part along the gradient. The "
        "runs share the scale of an image. The noise is the same at each point; pixels are not clipped."
    )
    figures = []
    for place in found.pictured:
        planes = [p for r in found.results if isinstance(p := r.images[place].landscape, Landscape)]
        labels = [r.subject.label for r in found.results]
        title = _title(found, found.copies[place])
        drawn = pictures.svg_uri(pictures.planes(labels, planes))
        alt = f"loss around image {found.copies[place].index} for {', '.join(labels)}"
        figures.append(f'<figure class="plane"><figcaption>{escape(title)}</figcaption>{_img(drawn, alt)}</figure>')
    return f'<p class="note">{escape(about)}</p>{"".join(figures)}'


def _img(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{escape(alt)}">'


def _table(heads: list[str], rows: Cells, label: str) -> str:
    """Write a table whose first column names the rows; cells are HTML."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
