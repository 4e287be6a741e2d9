"""Grid noise has the rounded Gaussian's distribution, and streams of different keys are independent.

Each check fails with a chance of at most 1e-6 for a random seed; the seeds are fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from bench.smoothing.chacha import KeyStreams
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.thresholds import thresholds

SIZE = 3072
BOUND = float(stats.norm.isf(0.5e-6))  # 4.9 standard errors, two-sided


def p_value(counts: NDArray[np.int64], sigma: float, levels: int, off: float = 0.0, factor: float = 1.0) -> float:
    """Chi-square of the counts of -reach .. reach; ``off`` and ``factor`` move and stretch what is expected."""
    reach = len(counts) // 2
    edges = (np.arange(-reach, reach) + 0.5) / (sigma * (levels - 1))
    cdf = stats.norm.cdf((edges - off) / factor)
    expected = np.diff(np.concatenate([[0], cdf, [1]])) * counts.sum()
    kept = np.flatnonzero(expected >= 20)  # an interval; what lies outside joins its ends
    cuts = np.r_[0, kept[1:]]
    found, wanted = np.add.reduceat(counts, cuts), np.add.reduceat(expected, cuts)
    return float(stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 17), (0.25, 256)])
def test_distribution_is_the_rounded_gaussian(sigma: float, levels: int) -> None:
    """Chi-square over all values of 1e8 draws: a sigma wrong by .3% or a mean wrong by .003 sigma is seen."""
    noise, reach = GridNoise(Noise(0, "test"), sigma, levels), thresholds(sigma, levels).reach
    counts = np.zeros(2 * reach + 1, np.int64)
    rows = 256
    for first in range(0, 10**8 // SIZE + 1, rows):
        drawn = noise.draw([Vote("estimate", i % 7, first + i) for i in range(rows)], SIZE).numpy()
        counts += np.bincount((drawn.ravel() + reach).astype(np.int64), minlength=len(counts))
    assert counts.sum() >= 10**8
    assert p_value(counts, sigma, levels) > 1e-6
    assert p_value(counts, sigma, levels, factor=1.003) < 1e-6
    assert p_value(counts, sigma, levels, off=0.003) < 1e-6


Key = tuple[int, str, str, int, int, int, int]  # seed, split, purpose, image, vote, call, part
BASE: Key = (0, "test", "estimate", 0, 0, 0, 0)
OTHERS: dict[str, list[Key]] = {
    "seed": [(seed, *BASE[1:]) for seed in (1, 2**62)],
    "split": [(0, split, *BASE[2:]) for split in ("validation", "audit")],
    "purpose": [(*BASE[:2], purpose, *BASE[3:]) for purpose in ("select", "check", "estimate/defense")],
    "image": [(*BASE[:3], image, *BASE[4:]) for image in (1, 2**31, 2**32 - 1)],
    "vote": [(*BASE[:4], vote, *BASE[5:]) for vote in (1, 2**31, 2**32, 2**40 - 1)],
    "call": [(*BASE[:5], call, 0) for call in (1, 2**15, 2**16 - 1)],
    "part": [(*BASE[:6], part) for part in (1, 2, 255)],
}


def words(key: Key, count: int) -> NDArray[np.uint32]:
    seed, split, purpose, image, vote, call, part = key
    found = np.empty(count, np.uint32)
    KeyStreams(seed, split).fill(found, [Vote(purpose, image, vote)], part, call=call)
    return found


@pytest.mark.parametrize("part", OTHERS)
def test_streams_of_keys_that_differ_in_one_part_are_independent(part: str) -> None:
    """Their bits agree as often as coins do, and their words are uncorrelated and independent in their leading bits."""
    count = 2**18
    for one, other in itertools.combinations([BASE, *OTHERS[part]], 2):
        a, b = words(one, count), words(other, count)
        agree = np.unpackbits((~(a ^ b)).view(np.uint8)).reshape(count, 32).sum(0, dtype=np.int64)
        assert abs(agree.sum() - 16 * count) < BOUND * np.sqrt(8 * count)
        assert np.abs(agree - count / 2).max() < stats.norm.isf(0.5e-6 / 32) * np.sqrt(count / 4)
        u, v = (2 * (x.astype(np.float64) + 0.5) / 2**32 - 1 for x in (a, b))
        for lag in (0, 1, 16):
            assert abs((u[: count - lag] * v[lag:]).sum()) < BOUND * np.sqrt(count / 9)
        table = np.bincount((a >> np.uint32(27)) * np.uint32(32) + (b >> np.uint32(27)), minlength=1024)
        assert stats.chisquare(table).pvalue > 1e-6


def test_dependent_streams_would_be_seen() -> None:
    """The bounds of the test above refuse streams of which one word in 50 is the same."""
    count = 2**18
    a, b = words(BASE, count), words((1, *BASE[1:]), count).copy()
    b[::50] = a[::50]
    agree = np.unpackbits((~(a ^ b)).view(np.uint8)).sum(dtype=np.int64)
    assert abs(agree - 16 * count) > BOUND * np.sqrt(8 * count)


Change = Callable[[int], Vote]


@pytest.mark.parametrize(
    "key",
    [
        lambda i: Vote("estimate", 0, i),
        lambda i: Vote("estimate", i, 0),
        lambda i: Vote("estimate", 0, i << 32),
        lambda i: Vote(f"purpose {i}", 0, 0),
    ],
    ids=["votes", "images", "high votes", "purposes"],
)
def test_rows_of_a_block_are_uncorrelated(key: Change) -> None:
    """All 1,770 pairs of 60 rows, every pixel with the next one, and the sums of the rows, which decide votes."""
    rows = 60
    drawn = GridNoise(Noise(0, "test"), 0.25, 256).draw([key(i) for i in range(rows)], 2**14).numpy()
    z = drawn / (0.25 * 255 * np.sqrt(1 + 1 / 12 / (0.25 * 255) ** 2))
    pairs = np.corrcoef(z)[np.triu_indices(rows, 1)]
    assert np.abs(pairs).max() < stats.norm.isf(0.5e-6 / len(pairs)) / np.sqrt(z.shape[1])
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < BOUND / np.sqrt(z[:, 1:].size)
    spread = (z.sum(1) ** 2).sum() / z.shape[1]
    assert stats.chi2.ppf(0.5e-6, rows) < spread < stats.chi2.isf(0.5e-6, rows)
