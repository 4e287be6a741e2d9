"""Resize images to a model's input as timm's transform does, by the interpolation of the model's config."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from bench.errors import BenchError

DEFAULT = "bilinear"  # of models that have no config; identities of bases name every other interpolation
METHODS = ("bicubic", "bilinear", "nearest")


def check_interpolation(what: str, interpolation: str) -> None:
    """Raise BenchError beginning with ``what`` where noisy images cannot be resized by ``interpolation``.

    torch has no lanczos, box or hamming, and ``random`` is two interpolations.
    """
    if interpolation not in METHODS:
        raise BenchError(
            f"{what}: interpolation {interpolation!r:.40} of its config cannot be computed on noisy images; set it "
            f"there to {', '.join(METHODS[:-1])} or {METHODS[-1]} (resample 3, 2 or 0 in a preprocessor_config.json), "
            f"or give a model whose input has the images' size"
        )


def resample(x: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """Resize images [B, C, H, W] to ``size`` (height, width), equal to Pillow's without its rounding and clipping."""
    if interpolation == "nearest":
        return F.interpolate(x, list(size), mode="nearest-exact")  # "nearest" of torch takes other pixels than Pillow
    # torch has Pillow's bicubic kernel (a = -0.5) with antialias alone, even where images grow; bilinear images that
    # grow are the same with and without it.
    antialias = interpolation == "bicubic" or size[0] < x.shape[-2] or size[1] < x.shape[-1]
    return F.interpolate(x, list(size), mode=interpolation, align_corners=False, antialias=antialias)
