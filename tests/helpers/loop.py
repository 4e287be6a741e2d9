"""The certification loop that papers publish, for comparisons of time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import beta, norm

BATCH = 1000


def published_loop(
    model: Any, pixels: torch.Tensor, classes: int, sigma: float, n0: int, n: int, alpha: float
) -> tuple[int, float]:
    """Return class (-1: abstained) and radius of one image [C, H, W].

    Of the form of Cohen et al. 2019 (arXiv 1902.02918): batches of 1000 fresh torch normals, n0 votes, then n, each
    vote counted in Python.
    """

    def count(votes: int) -> np.ndarray[Any, Any]:
        counts = np.zeros(classes, dtype=int)
        while votes > 0:
            size = min(BATCH, votes)
            votes -= size
            batch = pixels.repeat((size, 1, 1, 1))
            batch = batch + torch.randn_like(batch) * sigma
            for predicted in model(batch).argmax(1).cpu().numpy():
                counts[predicted] += 1
        return counts

    top = int(count(n0).argmax())
    hits = int(count(n)[top])
    lower = float(beta.ppf(alpha, hits, n - hits + 1))
    return (top, sigma * float(norm.ppf(lower))) if lower > 0.5 else (-1, 0.0)
