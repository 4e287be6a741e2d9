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


def loss(lost: int, won: int) -> float:
    """One-sided exact McNemar: the chance of at least ``lost`` losses among these changes, each a fair coin."""
    return float(stats.binom.sf(lost - 1, lost + won, 0.5))


def regresses(lost: int, won: int, images: int, adjusted: float, level: float, points: float) -> bool:
    """Whether more is lost than chance explains (``adjusted``, a p-value of ``loss``) and than anyone would mind."""
    return adjusted <= level and 100 * (lost - won) >= points * images


def power(images: int, lost: float, won: float, level: float, points: float) -> float:
    """The exact chance that ``regresses``, where each image is lost or won with these chances on its own.

    Summed over the number of changes; given that, losses are binomial.
    """
    if lost + won == 0:
        return 0.0
    changes = np.arange(images + 1)
    significant = stats.binom.isf(level, changes, 0.5) + 1
    needed = np.maximum(significant, np.ceil((changes + points * images / 100) / 2 - 1e-9))
    caught = stats.binom.sf(needed - 1, changes, lost / (lost + won))
    return float(np.sum(stats.binom.pmf(changes, images, lost + won) * caught))


def largest_size(images: int, level: float) -> float:
    """The largest chance that ``loss`` falls to ``level`` by chance alone, over every number of changes."""
    changes = np.arange(images + 1)
    return float(np.max(stats.binom.sf(stats.binom.isf(level, changes, 0.5), changes, 0.5)))
