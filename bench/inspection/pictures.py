"""The pictures of ``bench inspect``: images with maps laid over them, and contours of the loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.inspection.cam import Map
from bench.inspection.landscape import Landscape
from bench.report.gallery import data_uri

COLOURS = "inferno"  # of maps: dark at 0
LEVELS = 20  # of the loss
MAP_SHARE = 0.6  # of a map's colour in an overlay; the rest is the image in grey


def overlay(pixels: NDArray[np.float32], one: Map) -> str:
    """Return the data URI of an image [C, H, W], grey and clipped, under the colours of its map [H, W]."""
    grey = pixels.clip(0, 1).mean(0)[..., None]
    colours = np.asarray(matplotlib.colormaps[COLOURS](one), np.float32)[..., :3]
    mixed = (1 - MAP_SHARE) * grey + MAP_SHARE * colours
    return data_uri(mixed.transpose(2, 0, 1).astype(np.float32))


def scale() -> str:
    """Return the data URI of the colours of maps, from 0 to 1."""
    colours = np.asarray(matplotlib.colormaps[COLOURS](np.linspace(0, 1, 64)), np.float32)[:, :3]
    return data_uri(np.ascontiguousarray(colours.T[:, None, :]))


def planes(labels: Sequence[str], found: Sequence[Landscape], kind: str = "svg") -> bytes:
    """Draw the landscapes of one image side by side, in one scale of colours.

    Args:
        labels: Of the runs.
        found: One landscape a run.
        kind: svg or png.
    """
    finite = np.concatenate([p.losses[np.isfinite(p.losses)] for p in found])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    levels = np.linspace(low, high if high > low else low + 1, LEVELS + 1)
    with matplotlib.rc_context({"svg.hashsalt": "certbench", "font.size": 9}):
        figure = Figure(figsize=(2.6 * len(found) + 1.0, 3.0), layout="constrained")
        axes = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
        drawn = [
            axis.contourf(
                plane.offsets, plane.offsets, np.ma.masked_invalid(plane.losses), levels=levels, cmap="viridis"
            )
            for axis, plane in zip(axes, found, strict=True)
        ]
        for axis, label, plane in zip(axes, labels, found, strict=True):
            axis.plot(0, 0, marker="+", color="white", markersize=8, markeredgewidth=1.5)
            axis.set_title(label if len(label) <= 26 else f"{label[:25]}…")
            axis.set_xlabel("along its gradient (l2)" if plane.gradient else "random, as no gradient (l2)")
            axis.set_aspect("equal")
        axes[0].set_ylabel("random direction (l2)")
        figure.colorbar(drawn[0], ax=list(axes), label="mean loss", format="%.2g")
        out = io.BytesIO()
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def svg_uri(drawn: bytes) -> str:
    """Return the data URI of an SVG."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn).decode()
