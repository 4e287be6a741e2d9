"""Tests and intervals for shares of two sets of images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.records.unpaired import difference_interval, fisher

SIZE = st.integers(1, 30)


def by_counting(first: int, n: int, second: int, m: int) -> float:
    """Fisher's two-sided p-value as defined: all tables of these margins that are no more likely than the one seen."""
    total = first + second
    weights = {k: math.comb(n, k) * math.comb(m, total - k) for k in range(max(0, total - m), min(n, total) + 1)}
    return sum(w for w in weights.values() if w <= weights[first]) / sum(weights.values())


@given(n=SIZE, m=SIZE, data=st.data())
def test_fisher_is_the_sum_over_tables_that_are_as_unlikely(n: int, m: int, data: st.DataObject) -> None:
    first, second = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    wanted = 1.0 if first * m == second * n else by_counting(first, n, second, m)
    assert fisher(first, n, second, m) == pytest.approx(wanted)
    assert fisher(second, m, first, n) == pytest.approx(fisher(first, n, second, m))


@given(n=SIZE, m=SIZE, data=st.data())
def test_means_over_seeds_are_rounded_towards_each_other(n: int, m: int, data: st.DataObject) -> None:
    first, second = data.draw(st.floats(0, n)), data.draw(st.floats(0, m))
    if first / n > second / m:
        first, n, second, m = second, m, first, n
    low, high = math.ceil(first - 1e-9), math.floor(second + 1e-9)
    found = fisher(first, n, second, m)
    assert found == (1.0 if low / n >= high / m else pytest.approx(by_counting(low, n, high, m)))
    assert (low - first) >= -1e-9 and (second - high) >= -1e-9


def test_the_chance_of_a_false_alarm_is_at_most_the_level() -> None:
    n, m = 25, 16
    values = np.array([[fisher(a, n, b, m) for b in range(m + 1)] for a in range(n + 1)])
    for p in (0.05, 0.3, 0.5, 0.8):
        chance = np.outer(stats.binom.pmf(range(n + 1), n, p), stats.binom.pmf(range(m + 1), m, p))
        assert chance[values < 0.05].sum() <= 0.05


def test_intervals_are_those_that_newcombe_published() -> None:
    # Table II of the paper, method 10: 56/70 - 48/80, 9/10 - 3/10, 6/7 - 2/7, 5/56 - 0/29, 10/10 - 0/10.
    for counts, low, high in (
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((10, 10, 0, 10), 0.6075, 1.0000),
    ):
        first, n, second, m = counts
        found = difference_interval(second, m, first, n)
        assert found == pytest.approx((low, high), abs=6e-5)


def test_the_interval_covers_the_difference() -> None:
    """Exact coverage over both binomials, on average 95% as in the paper, and nowhere far below."""
    n, m, covered = 100, 60, []
    limits = np.array([[difference_interval(a, n, b, m) for b in range(m + 1)] for a in range(n + 1)])
    for p, q in itertools.product((0.03, 0.2, 0.45, 0.6, 0.9), repeat=2):
        chance = np.outer(stats.binom.pmf(range(n + 1), n, p), stats.binom.pmf(range(m + 1), m, q))
        inside = (limits[..., 0] <= q - p + 1e-12) & (q - p - 1e-12 <= limits[..., 1])
        covered.append(float(chance[inside].sum()))
    assert min(covered) > 0.93 and 0.945 < np.mean(covered) < 0.97
