"""Exact acceptance counts of a sequential test: how many votes for the class certify p > p0, at each look.

The false-acceptance probability is spent over the looks as a function of the votes (Lan and DeMets 1983; the power
family of Kim and DeMets 1987), and each count is the smallest whose exact crossing probability stays within what may
be spent. The probability is computed by dynamic programming over the number of votes for the class (Armitage,
McPherson and Rowe 1969) and rounded up. docs/certification.md has the proof.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

# Share of the allowed probability that all truncated tails may take together.
TRUNCATED = 1e-9


def rounding(n: int) -> float:
    """Return a bound on the relative rounding error of a probability computed over looks up to ``n`` votes.

    All terms are positive, so relative errors add. A look after ``step`` votes takes at most 13 ``step`` roundings of
    2^-53: 4 a weight (4 ``step``), their sum and the division by it (5 ``step`` + 1), product and sum of the
    convolution (``step`` + 2). Sums over counts and looks take at most 2 n + 1 more. That is below 16 n in all; the
    bound is twice as large.
    """
    return n * 2.0**-48


def acceptance_counts(p0: float, looks: Counts, allowed: Floats) -> tuple[Counts, float]:
    """Return the fewest votes that accept p > p0 at each look, and the chance to accept ever if p <= p0.

    Args:
        p0: the threshold, at least 1/2. Every acceptance is "at least so many votes", so the chance is largest at p0.
        looks: the numbers of votes at which to test, rising.
        allowed: upper bound, below 1, of the chance to accept at a look or before; rising with the looks.

    The chance is an upper bound: rounding and truncated tails are added to it. It is at most ``allowed[-1]``. A look
    at which all votes together do not suffice gets one vote more than it has.
    """
    slack, tail = rounding(int(looks[-1])), TRUNCATED * float(allowed[-1]) / len(looks) / 4
    steps_of = _binomial(p0, tail)
    # alive[i]: chance of low + i votes so far without acceptance.
    alive, low, spent = np.ones(1), 0, 0.0
    counts, before = [], 0
    for look, limit in zip(looks.tolist(), (allowed * (1 - 2 * slack)).tolist(), strict=True):
        first, step = steps_of(look - before)
        alive, low, before = np.convolve(alive, step), low + first, look
        # Paths in a truncated tail count as accepted: two tails of the step, one of the sum; a fourth for underflow.
        spent += 4 * tail
        dropped = int(np.searchsorted(np.cumsum(alive), tail))
        alive, low = alive[dropped:], low + dropped
        upper = np.cumsum(alive[::-1])
        accepted = int(np.searchsorted(upper, limit - spent, side="right"))
        if accepted:
            spent += float(upper[accepted - 1])
            alive = alive[: len(alive) - accepted]
        counts.append(low + len(alive))
    return np.array(counts, np.int64), spent * (1 + slack)


def _binomial(p: float, tail: float) -> Callable[[int], tuple[int, Floats]]:
    """Return a function from a number of votes to its binomial probabilities, without tails of at most ``tail`` each.

    It gives the count of the first probability and the probabilities. 1/2 <= p < 1, so 1 - p is exact.
    """
    odds = p / (1 - p)

    @cache
    def probabilities(votes: int) -> tuple[int, Floats]:
        mode = min(votes, int((votes + 1) * p))
        up, down = np.arange(mode, votes), np.arange(mode, 0, -1)
        # Weights relative to the mode, each from its neighbour's: no special function whose error must be trusted.
        above = np.cumprod((votes - up) / (up + 1) * odds)
        below = np.cumprod(down / (votes - down + 1) / odds)
        weights = np.concatenate([below[::-1], np.ones(1), above])
        weights /= weights.sum()
        first = int(np.searchsorted(np.cumsum(weights), tail))
        last = len(weights) - int(np.searchsorted(np.cumsum(weights[::-1]), tail))
        return first, weights[first:last]

    return probabilities
