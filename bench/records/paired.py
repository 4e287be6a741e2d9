"""Statistics of classifiers on the same images: pure functions of counts.

Of ``n`` images, only the first classifier gets ``first`` right, and only the second gets ``second`` right; images
that both or neither get right do not show which is better. A method with several seeds has, on each image, the
number of its seeds that are right.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

LEVEL = 0.05  # of a false "significantly worse" anywhere in a column of a table
Z = float(stats.norm.ppf(0.975))


def mcnemar(first: int, second: int) -> float:
    """Compute the p-value of McNemar's exact test: a discordant image goes either way like a fair coin."""
    return min(1.0, 2 * float(special.bdtr(min(first, second), first + second, 0.5)))


def sign_flip(differences: NDArray[np.int64]) -> float:
    """Compute the two-sided p-value of the exact paired permutation test on the images' differences.

    If two methods are interchangeable on every image, each difference is as likely to have the other sign, the
    images independently. With one seed each, this is McNemar's exact test.
    """
    sizes = np.bincount(np.abs(differences))
    used = np.flatnonzero(sizes[1:]) + 1
    unit = math.gcd(*used.tolist())
    return _flipped(abs(int(differences.sum())) // max(1, unit), tuple((int(c) // unit, int(sizes[c])) for c in used))


@lru_cache(maxsize=2**14)
def _flipped(total: int, sizes: tuple[tuple[int, int], ...]) -> float:
    """Compute P(abs(S) >= total), S the sum of ``number`` random signs times ``size`` for each of ``sizes``.

    S is a whole number in [-most, most], so the discrete Fourier transform of its characteristic function,
    the product of cos(size t)^number, is its distribution.
    """
    if total == 0:
        return 1.0
    images, most = sum(number for _, number in sizes), sum(size * number for size, number in sizes)
    if len(sizes) == 1:  # all of size 1, the common divisor
        return mcnemar((images - total) // 2, (images + total) // 2)
    t = 2 * np.pi * np.arange(2 * most + 1) / (2 * most + 1)
    wave = np.ones(len(t))
    for size, number in sizes:
        wave *= np.cos(size * t) ** number
    tail = 2 * float(np.fft.fft(wave).real[total : most + 1].sum()) / len(t)
    return min(1.0, max(tail, 2.0 ** (1 - images)))  # the outcome seen and its mirror image are among those


def worse_than_best(right: Sequence[NDArray[np.int64]], seeds: Sequence[int], best: int) -> list[float]:
    """Compute the p-value of each method against the ``best``, after Holm's correction over all pairs of methods.

    ``right[m]`` has the number of method m's ``seeds[m]`` that are right on each image. The best is chosen on the
    same images, so only a correction over all pairs bounds the chance of a false claim.
    """
    pairs = list(itertools.combinations(range(len(right)), 2))
    adjusted = holm([sign_flip(right[a] * seeds[b] - right[b] * seeds[a]) for a, b in pairs])
    found = dict(zip(pairs, adjusted, strict=True))
    return [1.0 if m == best else found[min(m, best), max(m, best)] for m in range(len(right))]


def holm(pvalues: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm: rejecting those up to a, the chance of any false rejection is at most a."""
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = largest
    return adjusted


def score_interval(first: int, second: int, n: int) -> tuple[float, float]:
    """Compute the 95% score interval of (second - first) / n, the difference of two paired proportions.

    Tango, Statistics in Medicine 17 (1998) 891-908: the differences that the score test does not reject at 5%,
    with the other parameter at its maximum likelihood given the difference.
    """
    estimate = (second - first) / n

    def score(difference: float) -> float:
        linear = (2 * n + first - second) * difference - first - second
        root = math.sqrt(max(0.0, linear**2 + 8 * n * first * difference * (1 - difference)))
        only_first = (root - linear) / (4 * n)
        variance = n * (2 * only_first + difference * (1 - difference))
        return (second - first - n * difference) / math.sqrt(max(variance, 1e-300))

    return _crossing(lambda d: score(d) - Z, -1.0, estimate), _crossing(lambda d: score(d) + Z, 1.0, estimate)


def _crossing(excess: Callable[[float], float], end: float, estimate: float) -> float:
    """Return where ``excess`` is 0 between the end of the range and the estimate; the end if it is 0 nowhere."""
    if end == estimate:
        return end
    near = end * (1 - 1e-12)
    return float(optimize.brentq(excess, near, estimate)) if excess(near) * excess(estimate) < 0 else end


def loss(lost: int, won: int) -> float:
    """Compute McNemar's exact one-sided p-value: P(at least ``lost`` losses), each change a fair coin."""
    return float(stats.binom.sf(lost - 1, lost + won, 0.5))


def regresses(lost: int, won: int, images: int, adjusted: float, level: float, points: float) -> bool:
    """Return whether the loss is significant (``adjusted``: a p-value of ``loss``) and at least ``points`` large."""
    return adjusted <= level and 100 * (lost - won) >= points * images


def power(images: int, lost: float, won: float, level: float, points: float) -> float:
    """Compute the exact chance that ``regresses``, where images are lost or won independently with these chances.

    Summed over the number of changes; given that, losses are binomial.
    """
    if lost + won == 0:
        return 0.0
    # Numbers of changes outside these limits have a chance below 2e-13 together.
    least, most = stats.binom.ppf(1e-13, images, lost + won), stats.binom.isf(1e-13, images, lost + won)
    changes = np.arange(least, most + 1)
    significant = stats.binom.isf(level, changes, 0.5) + 1
    needed = np.maximum(significant, np.ceil((changes + points * images / 100) / 2 - 1e-9))
    caught = stats.binom.sf(needed - 1, changes, lost / (lost + won))
    return float(np.sum(stats.binom.pmf(changes, images, lost + won) * caught))


@lru_cache(maxsize=2**8)
def smallest_shown(images: int, level: float, chance: float, churn: float = 0.0) -> float | None:
    """Compute the smallest difference that McNemar's exact two-sided test shows with probability ``chance``.

    ``churn`` is the share of images on which the two classifiers also differ by chance, half of it either way; at 0
    the better classifier is right wherever the worse is. Returned as a share of the images, rounded up to a thousandth;
    None where no difference is shown with that probability.
    """

    def shown(thousandths: int) -> bool:
        return power(images, thousandths / 1000 + churn / 2, churn / 2, level / 2, 0.0) >= chance

    most = round(1000 * (1 - churn))
    found = bisect.bisect_left(range(most + 1), True, key=shown)
    return found / 1000 if found <= most else None


def largest_size(images: int, level: float) -> float:
    """Compute the largest probability that ``loss`` is at most ``level`` by chance, over all numbers of changes."""
    changes = np.arange(images + 1)
    return float(np.max(stats.binom.sf(stats.binom.isf(level, changes, 0.5), changes, 0.5)))
