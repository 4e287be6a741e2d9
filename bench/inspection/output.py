"""The files of ``bench inspect``: the page, and beside it every number as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import __version__
from bench.inspection import gradients
from bench.inspection.copies import SEED
from bench.inspection.intervals import LEVEL
from bench.inspection.landscape import Landscape
from bench.inspection.measure import DRAWS, ImageResult, Inspection, SubjectResult
from bench.inspection.numbers import NUMBERS
from bench.inspection.page import page
from bench.io.files import write_text, writing

PAGE, DATA, VALUES, LANDSCAPES = "inspect.html", "inspect.json", "values.csv", "landscapes.csv"


def write(found: Inspection, out: Path) -> list[Path]:
    """Write all files into a folder, which is made. Raises BenchError where it cannot be written."""
    texts = {
        PAGE: page(found),
        DATA: json.dumps(as_json(found), allow_nan=False) + "\n",
        VALUES: _csv(_values(found)),
        LANDSCAPES: _csv(_landscapes(found)),
    }
    with writing(out, "choose another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(out / name, text)
    return [out / name for name in texts]


def as_json(found: Inspection) -> dict[str, Any]:
    """Return everything but the pictures' pixels, as a JSON object."""
    identity = found.results[0].subject.record.identity
    return {
        "certbench": __version__,
        "dataset": identity.dataset,
        "split": identity.split,
        "sigma": identity.sigma,
        "images": [{"index": c.index, "label": c.label} for c in found.copies],
        "draws": DRAWS,
        "seed": SEED,
        "level": LEVEL,
        "finite_difference_step": gradients.STEP * identity.sigma,
        "manifold_step": gradients.MOVE * identity.sigma,
        "denoiser": found.denoiser,
        "definitions": [{k: getattr(n, k) for k in ("key", "title", "definition", "source")} for n in NUMBERS],
        "runs": [_run(result, found.pictured) for result in found.results],
    }


def summary(found: Inspection) -> list[dict[str, Any]]:
    """Return the numbers of each run with their intervals, as JSON objects."""
    return [
        {
            "label": result.subject.label,
            "path": str(result.subject.record.path),
            "numbers": {n.key: asdict(result.summary(n)) for n in NUMBERS},
        }
        for result in found.results
    ]


def _run(result: SubjectResult, pictured: list[int]) -> dict[str, Any]:
    return {
        "label": result.subject.label,
        "folder": result.subject.record.path.name,
        "identity": result.subject.record.identity.sha256,
        "cam_layer": result.layer or None,
        "cam_grid": result.grid,
        "cam_of_changed_pixels": result.behind,
        "no_cam": result.no_map or None,
        "numbers": {n.key: asdict(result.summary(n)) for n in NUMBERS},
        "images": [_image(image, place in pictured) for place, image in enumerate(result.images)],
    }


def _image(image: ImageResult, pictured: bool) -> dict[str, Any]:
    maps = [[[round(float(v), 4) for v in row] for row in one] for one in image.maps] if pictured else []
    return {
        "index": image.index,
        "label": image.label,
        "values": {key: [_finite(v) for v in values] for key, values in image.values.items()},
        "maps": {"clean": maps[0], "noisy": maps[1:]} if maps else None,
        "landscape": None if image.landscape is None else _plane(image.landscape),
    }


def _plane(plane: Landscape) -> dict[str, Any]:
    return {
        "offsets": plane.offsets.tolist(),
        "losses": [[_finite(v) for v in row] for row in plane.losses],  # rows: random direction; columns: gradient
        "along_gradient": plane.gradient,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _values(found: Inspection) -> Iterator[list[object]]:
    yield ["run", "image", "label", "draw", "number", "value"]
    for result in found.results:
        for image in result.images:
            for key, values in image.values.items():
                for draw, value in enumerate(values):
                    row = [result.subject.record.path.name, image.index, image.label, draw, key]
                    yield [*row, "" if (v := _finite(value)) is None else v]


def _landscapes(found: Inspection) -> Iterator[list[object]]:
    yield ["run", "image", "along_gradient", "along_random", "loss"]
    for result in found.results:
        for image in result.images:
            if (plane := image.landscape) is None:
                continue
            for across, row in zip(plane.offsets, plane.losses, strict=True):
                for along, loss in zip(plane.offsets, row, strict=True):
                    value = "" if (v := _finite(loss)) is None else v
                    yield [result.subject.record.path.name, image.index, float(along), float(across), value]


def _csv(rows: Iterator[list[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
