"""Made-up pictures for tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def png(mode: str = "RGB", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """An encoded random picture; size is (width, height)."""
    if mode == "I;16":
        image = Image.fromarray(RNG.integers(0, 65536, size[::-1]).astype(np.uint16))
    else:
        image = Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()
