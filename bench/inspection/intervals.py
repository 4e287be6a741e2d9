"""Means and ratios of means over images, each with a 95% interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate over ``images`` images with its interval; None where there are too few images for it."""

    value: float | None
    low: float | None
    high: float | None
    images: int


def mean(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Interval:
    """Return the mean of one value an image with its t interval; values that are not finite are left out.

    ``least`` and ``most`` are the values' range, at which the interval ends.
    """
    kept = np.array([v for v in values if math.isfinite(v)], np.float64)
    if not len(kept):
        return Interval(None, None, None, 0)
    value = float(kept.mean())
    found = _around(value, kept, value)
    if found.low is None or found.high is None:
        return found
    return Interval(value, max(found.low, least), min(found.high, most), found.images)


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the mean of ``above`` divided by that of ``below``, of one pair an image.

    The interval is a jackknife t interval of the ratio's logarithm: for a mean it would be the t interval itself.
    """
    pairs = np.array([p for p in zip(above, below, strict=True) if all(map(math.isfinite, p))], np.float64)
    pairs = pairs.reshape(-1, 2)
    if not len(pairs) or not (pairs.sum(0) > 0).all():
        return Interval(None, None, None, len(pairs))
    whole = _log_ratio(pairs.sum(0))
    n = len(pairs)
    left = pairs.sum(0) - pairs
    if n < 2 or not (left > 0).all():
        return Interval(math.exp(whole), None, None, n)
    pseudo = n * whole - (n - 1) * np.array([_log_ratio(row) for row in left])
    found = _around(whole, pseudo, whole)
    assert found.low is not None and found.high is not None, "there are two pairs or more"
    return Interval(math.exp(whole), math.exp(found.low), math.exp(found.high), n)


def _log_ratio(sums: NDArray[np.float64]) -> float:
    return float(np.log(sums[0]) - np.log(sums[1]))


def _around(value: float, sample: NDArray[np.float64], centre: float) -> Interval:
    """Return the t interval of a sample's mean, around ``centre``."""
    n = len(sample)
    if n < 2:
        return Interval(value, None, None, n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Interval(value, centre - half, centre + half, n)
