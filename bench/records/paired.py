"""Statistics of classifiers judged on the same images: pure functions of counts.

Of ``n`` images, ``first`` are right by the first classifier only and ``second`` by the second only; images
that both or neither get right say nothing about which is better. A method with several seeds has, on each
image, the number of its seeds that are right.
"""

from __future__ import annotations

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
    """P-value of McNemar's exact test: discordant images fall either way like a fair coin."""
    return min(1.0, 2 * float(special.bdtr(min(first, second), first + second, 0.5)))


def sign_flip(differences: NDArray[np.int64]) -> float:
    """P-value of the exact paired permutation test on the images' differences, two-sided.

    If two methods are interchangeable on every image, each difference is as likely to have the other sign, the
    images independently. With one seed each, this is McNemar's exact test.
    """
    sizes = np.bincount(np.abs(differences))
    used = np.flatnonzero(sizes[1:]) + 1
    unit = math.gcd(*used.tolist())
    return _flipped(abs(int(differences.sum())) // max(1, unit), tuple((int(c) // unit, int(sizes[c])) for c in used))


@lru_cache(maxsize=2**14)
def _flipped(total: int, sizes: tuple[tuple[int, int], ...]) -> float:
    """P(abs(S) >= total) for S the sum of ``number`` independent random signs times ``size``, for each of ``sizes``.

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
    """P-value of each method against the ``best``, after Holm's correction over all pairs of methods.

    ``right[m]`` holds how many of method m's ``seeds[m]`` are right on each image. The best is chosen from the
    same images, so that a pair with it is as good as any pair; only all of them bound the chance of a false claim.
    """
    pairs = list(itertools.combinations(range(len(right)), 2))
    adjusted = holm([sign_flip(right[a] * seeds[b] - right[b] * seeds[a]) for a, b in pairs])
    found = dict(zip(pairs, adjusted, strict=True))
    return [1.0 if m == best else found[min(m, best), max(m, best)] for m in range(len(right))]


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: rejecting those at most a, the chance of any false rejection is at most a."""
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = largest
    return adjusted


def score_interval(first: int, second: int, n: int) -> tuple[float, float]:
    """95% score interval of (second - first) / n, the difference of two paired proportions.

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
