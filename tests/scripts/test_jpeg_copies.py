"""One more encoding loses about as much as the first, if its blocks begin elsewhere."""

from __future__ import annotations

import io

import numpy as np
import pytest
from jpeg_copies import encoded_again
from PIL import Image
from scipy.ndimage import gaussian_filter


def test_one_more_encoding_loses_about_as_much_as_the_first() -> None:
    rng = np.random.default_rng(0)
    first, second, in_place = [], [], []
    for _ in range(40):
        smooth = gaussian_filter(rng.normal(0, 1, (32, 32, 3)), (2, 2, 0), mode="wrap")
        original = np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(original).save(out, "JPEG", quality=75)
        before, after = encoded_again(out.getvalue())
        first.append(np.square(before.astype(float) - original).mean())
        second.append(np.square(after.astype(float) - before).mean())
        in_place.append(np.square(encoded_again(out.getvalue(), (0, 0))[1].astype(float) - before).mean())
    assert 0.5 < np.mean(second) / np.mean(first) < 1.5
    assert np.mean(in_place) < 0.2 * np.mean(first)


def test_another_format_is_refused() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    with pytest.raises(ValueError, match="PNG"):
        encoded_again(out.getvalue())
