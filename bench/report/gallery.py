"""Pictures for the report page, read from the data set where it is on this machine: run folders hold no pixels."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.data.datasets import load_card, load_split
from bench.data.split import Split
from bench.errors import BenchError
from bench.records.record import Record
from bench.smoothing import gridnoise, noise
from bench.smoothing.noise import Noise, Vote


def local_split(record: Record) -> Split:
    """Load the split that the run certified, without downloads. Raises BenchError where it is absent or different."""
    identity = record.identity
    with _offline():
        card = load_card(record.info.arguments.get("dataset", identity.dataset))
        if card.sha256() != identity.card:
            raise BenchError(f"the card {card.name} on this machine is not the one of these runs")
        split = load_split(card, identity.split)
    indices = identity.indices
    if max(indices) >= len(split) or split.sha256(indices) != identity.images:
        raise BenchError(f"the images of {card.name} on this machine are not those of these runs")
    return split


@contextmanager
def _offline() -> Iterator[None]:
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        del os.environ["HF_HUB_OFFLINE"]
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def pictures(record: Record, split: Split, index: int, votes: Sequence[int]) -> list[str]:
    """Return data URIs of an image and of its noisy versions in the given votes, clipped to [0, 1].

    Raises BenchError where this version of bench draws other noise than the run's.
    """
    identity = record.identity
    kind, sigma = identity.noise.kind, identity.sigma
    grid = gridnoise.KINDS.get(str(identity.noise.grid_version))
    if identity.noise.version != noise.VERSION or (kind == "grid" and grid is None):
        raise BenchError("the noise of these runs was drawn by another version of bench")
    source = Noise(identity.seed or 0, identity.split)
    keys, rows = [Vote("estimate", index, v) for v in votes], [index] * len(votes)
    if grid is not None:
        integers = split.integers(rows)
        drawn = grid(source, sigma, split.levels).draw(keys, integers[0].size).numpy()
        noisy = (integers + drawn.reshape(integers.shape)) / np.float32(split.levels - 1)
    else:
        pixels = split.pixels(rows)
        noisy = pixels + sigma * source.normals(keys, pixels[0].size).numpy().reshape(pixels.shape)
    return [data_uri(p.astype(np.float32)) for p in (split.pixels([index])[0], *noisy)]


def data_uri(pixels: NDArray[np.float32]) -> str:
    """Encode pixels [1 or 3 channels, H, W] as a PNG, clipped to [0, 1]."""
    levels = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
