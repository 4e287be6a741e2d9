"""The rounded Gaussian as thresholds on 64-bit words: the values of grid noise, and their distance from the exact ones.

A word may come in two parts: its leading 32 bits, which decide nearly every value, and 32 more that are needed only
where the leading ones equal those of a threshold (2e-7 of the pixels at 256 levels and sigma .25).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

AMBIGUOUS = -(2**15)  # in the guide: a threshold lies inside this cell
ONE = 2**64
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")

Lower = Callable[[NDArray[np.int64]], NDArray[np.uint32]]


@dataclass(frozen=True)
class Thresholds:
    """The rounded Gaussian as an inverse distribution function on 64-bit words.

    A word u gives the value k = (number of ``edges`` <= u) - reach, in [-reach, reach].
    """

    edges: NDArray[np.uint64]  # 2*reach of them, ascending: 2^64 * Phi((k + 1/2)/s), rounded to nearest
    guide: NDArray[np.int16]  # the value of all words with these 16 leading bits, or AMBIGUOUS
    reach: int  # the largest value, in grid steps: beyond 9 sigma

    def search(self, words: NDArray[np.uint64]) -> NDArray[np.int16]:
        """Return the values of the words by binary search, which defines them."""
        return (np.searchsorted(self.edges, words, side="right") - self.reach).astype(np.int16)

    @cached_property
    def upper(self) -> NDArray[np.uint32]:
        """The leading 32 bits of the edges."""
        return (self.edges >> np.uint64(32)).astype(np.uint32)

    def values(self, leads: NDArray[np.uint32], lower: Lower) -> NDArray[np.int16]:
        """Return the same values of words in two parts, mostly by one look-up: 1 to 5 in 100 need a search.

        Args:
            leads: the words' leading 32 bits, [count].
            lower: called with indices of ``leads`` whose words need their lower 32 bits, and returns these.
        """
        found = self.guide.take((leads >> np.uint32(16)).astype(np.int64), mode="clip")  # "clip" skips the check
        hard = np.flatnonzero(found == AMBIGUOUS)
        few = leads[hard]
        # Edges with smaller leading bits lie below the word, whatever its lower bits.
        below = self.upper.searchsorted(few, side="left")
        tied = np.flatnonzero(self.upper.take(below, mode="clip") == few)
        found[hard] = below - self.reach
        if len(tied):
            words = few[tied].astype(np.uint64) << np.uint64(32) | lower(hard[tied])
            found[hard[tied]] = self.search(words)
        return found


@lru_cache(maxsize=8)
def thresholds(sigma: float, levels: int) -> Thresholds:
    """Return the thresholds for noise of ``sigma`` (pixels in [0, 1]) on a grid of ``levels`` pixel values."""
    if not sigma > 0 or levels < 2:
        raise ValueError(f"grid noise needs sigma > 0 and at least 2 levels, not sigma {sigma} and {levels} levels")
    if 10 * sigma * (levels - 1) + levels > 2**15 - 2:
        raise ValueError(f"grid noise of sigma {sigma} on {levels} levels exceeds 16-bit integers: use float noise")
    upper: list[int] = []
    with localcontext(Context(prec=60)) as context:
        s = Decimal(sigma) * (levels - 1)
        while (edge := _scaled_cdf((len(upper) + Decimal("0.5")) / s, context)) < ONE:
            upper.append(edge)
    reach = len(upper)
    edges = np.array([ONE - edge for edge in reversed(upper)] + upper, np.uint64)
    first = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    low, high = (np.searchsorted(edges, w, side="right") for w in (first, first | np.uint64(2**48 - 1)))
    guide = np.where(low == high, low - reach, AMBIGUOUS).astype(np.int16)
    return Thresholds(edges, guide, reach)


def _scaled_cdf(x: Decimal, context: Context) -> int:
    """Return 2^64 * Phi(x) for x > 0, rounded to nearest.

    Phi(x) = 1/2 + phi(x) * sum_n x^(2n+1)/(2n+1)!!. All terms are positive, so nothing cancels: fewer than 1,000
    operations of relative error 1e-59 each. The sum stops at a term below 1e-40 whose successor is less than half of
    it, so the rest is below 1e-40 too. In total Phi is exact to 1e-39.
    """
    if x >= 10:  # 1 - Phi(10) < 1e-23 < 2^-65
        return ONE
    square, term, total, odd = x * x, x, x, 1
    while term > Decimal("1e-40") or 2 * square > odd:
        odd += 2
        term = term * square / odd
        total += term
    density = context.exp(-square / 2) / context.sqrt(2 * PI)
    return int(((Decimal("0.5") + density * total) * ONE).to_integral_value())


def tau(sigma: float, levels: int, size: int) -> float:
    """Bound the total variation between the drawn noise and the exact rounded Gaussian, for ``size`` pixels.

    It is a probability, charged once to a certificate: p_lower - tau, or p0 + tau (Voracek and Hein, ICLR 2023).

    Proof. Let e_k be the drawn minus the exact distribution function at k + 1/2. At each of the m
    thresholds |e_k| <= d = 2^-65 + 1e-39, the rounding to 64 bits and the error of Phi. Below the first
    no noise is drawn, and the exact function rises monotonically from 0 to at most d, since there it rounds
    to 0; above the last likewise. The total variation of one pixel is half the sum of |e_k - e_(k-1)| over
    all k, hence at most the sum of |e_k| over the thresholds plus the largest |e_k| below and above them:
    (m + 2) d < (m + 3) 2^-65, as m < 2^16. Over independent pixels total variations add up at most. An
    integer below 2^53 times a power of two is exact, so no rounding occurs. (Words are uniform: ChaCha20.)
    """
    return math.ldexp(size * (len(thresholds(sigma, levels).edges) + 3), -65)
