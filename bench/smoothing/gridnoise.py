"""Gaussian noise rounded to the pixel grid: certificates that are true in floating point.

In floats, x + noise is not a translated Gaussian: its last bits reveal x, and radii have been certified at which an
adversarial example exists (Voracek and Hein, ICLR 2023). Here pixels are integers 0 .. levels-1, in units of
1/(levels-1), and the noise is a Gaussian rounded to integers, so round(x + noise) = x + round(noise): the smoothing
theorem of Cohen et al. (ICML 2019) holds exactly for F after rounding. F must then see only the sum, so it is
computed in integers and converted once. (In float32, x/255 + k/255 differs from (x+k)/255 in a third of the pairs.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.smoothing.noise import Noise, Vote, to_device
from bench.smoothing.rows import Rows

VERSION = "aes128ctr-grid64-1"  # part of the identity of a run with grid noise

CALL = 2**16 - 1  # the part of a vote's key stream used here: no bits in common with float noise
CHUNK = 2**16  # words processed at a time: half a MiB fits into a core's cache
AMBIGUOUS = -(2**15)  # in the guide: a threshold lies inside this cell
ONE = 2**64
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


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

    def values(self, words: NDArray[np.uint64]) -> NDArray[np.int16]:
        """Return the same values, mostly by one look-up: 1 to 5 words in 100 need the search."""
        cells = (words >> np.uint64(48)).view(np.int64)
        found = self.guide.take(cells, mode="clip")  # every cell is in range; "clip" skips the check
        flat = found.reshape(-1)
        hard = np.flatnonzero(flat == AMBIGUOUS)
        flat[hard] = self.search(words.reshape(-1)[hard])
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
    integer below 2^53 times a power of two is exact, so no rounding occurs. (Words are uniform: AES.)
    """
    return math.ldexp(size * (len(thresholds(sigma, levels).edges) + 3), -65)


class GridNoise:
    """Grid noise of one (seed, split), sigma and grid: a key always gives the same values.

    For certification; training adds float noise. ``sigma`` is for pixels in [0, 1].
    """

    def __init__(self, noise: Noise, sigma: float, levels: int) -> None:
        self._noise, self._steps = noise, levels - 1
        self._thresholds = thresholds(sigma, levels)

    def draw(self, votes: Sequence[Vote] | Rows, size: int) -> Tensor:
        """Return noise in grid steps, int16 [len(votes), size] on the CPU; a row depends on its vote alone."""
        drawn = np.empty((len(votes), size), np.int16)
        rows = max(1, CHUNK // size)
        for i in range(0, len(votes), rows):
            words = self._noise.words(votes[i : i + rows], size, CALL)
            drawn[i : i + rows] = self._thresholds.values(words)
        return torch.from_numpy(drawn)

    def inputs(self, images: Tensor, rows: Rows) -> Tensor:
        """Return noisy images for F, one for each row of the integer images [k, C, H, W]: float32 pixels, unclipped.

        The integer sum is divided once, correctly rounded: equal sums give equal bits, and without noise the result
        is the card's own pixels. The divisor is a tensor on the images' device, because CUDA replaces division by a
        Python number with multiplication by its reciprocal, whose last bits differ from a CPU's.
        """
        if images.is_floating_point():
            raise TypeError("grid noise is added to integer pixels, not to floats")
        integers = images.index_select(0, rows.at)
        noise = to_device(self.draw(rows, integers[0].numel()), integers.device).view_as(integers)
        total = (integers + noise).to(torch.float32)
        return total.div_(torch.full((), float(self._steps), device=total.device))
