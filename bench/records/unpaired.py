"""Statistics of one classifier on two sets of images: pure functions of counts.

``first`` of ``n`` images are certified, and ``second`` of ``m`` others. A count may be a mean over seeds: as an image's
mean varies no more than one seed's result, tests and intervals for one seed's counts are then conservative.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from bench.records.paired import Z


def fisher(first: float, n: int, second: float, m: int) -> float:
    """Compute the two-sided p-value of Fisher's exact test that both shares are equal.

    Counts that are not whole are rounded so that the shares come closer, which raises the p-value.
    """
    if first * m > second * n:
        first, n, second, m = second, m, first, n
    low, high = math.ceil(first - 1e-9), math.floor(second + 1e-9)
    if low * m >= high * n:
        return 1.0
    total = low + high
    counts = np.arange(max(0, total - m), min(n, total) + 1)
    # As scipy's fisher_exact, which takes milliseconds: a report may have thousands of differences.
    chance = stats.hypergeom.pmf(counts, n + m, n, total)
    as_unlikely = chance <= chance[low - counts[0]] * (1 + 1e-7)
    return min(1.0, float(chance[as_unlikely].sum()))


def difference_interval(first: float, n: int, second: float, m: int) -> tuple[float, float]:
    """Compute the 95% interval of second / m - first / n from the score intervals of both shares.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998) 873-890.
    """
    p, q = first / n, second / m
    (p_low, p_high), (q_low, q_high) = _wilson(p, n), _wilson(q, m)
    return (
        q - p - math.hypot(q - q_low, p_high - p),
        q - p + math.hypot(q_high - q, p - p_low),
    )


def _wilson(p: float, n: int) -> tuple[float, float]:
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + Z * Z / n)), min(1.0, (centre + half) / (1 + Z * Z / n))
