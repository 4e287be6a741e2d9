"""Statistics of two classifiers judged on the same images: pure functions of counts.

Of ``n`` images, ``first`` are right by the first only and ``second`` by the second only; images
that both or neither get right say nothing about which is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000
SEED = 0


def mcnemar(first: int, second: int) -> float:
    """P-value of McNemar's exact test: discordant images fall either way like a fair coin."""
    if first + second == 0:
        return 1.0
    return float(stats.binomtest(first, first + second).pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those at most a, the chance of any false rejection is at most a."""
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = largest
    return adjusted


def bootstrap(first: int, second: int, n: int) -> tuple[float, float]:
    """95% percentile bootstrap interval of (second - first) / n, images drawn anew with replacement in pairs.

    A resample of the images enters only through how many of each kind it holds, and those counts are
    multinomial: drawing them is the bootstrap itself, in time that does not grow with ``n``.
    """
    shares = np.array([first, second, n - first - second]) / n
    drawn = np.random.default_rng(SEED).multinomial(n, shares, RESAMPLES)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [0.025, 0.975])
    return float(low), float(high)
