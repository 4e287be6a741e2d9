"""Intervals over images: those of textbooks, and what is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.inspection.intervals import Interval, mean, ratio

FEW = st.lists(st.floats(0.1, 10), min_size=3, max_size=12)


@given(FEW)
def test_a_mean_has_the_t_interval(values: list[float]) -> None:
    found = mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values) or 1e-9)
    assert found.value == pytest.approx(np.mean(values)) and found.images == len(values)
    assert found.low == pytest.approx(low, abs=1e-5) and found.high == pytest.approx(high, abs=1e-5)


@given(FEW, st.floats(0.2, 5))
def test_a_fixed_ratio_is_known_exactly(below: list[float], factor: float) -> None:
    found = ratio([factor * v for v in below], below)
    assert [found.value, found.low, found.high] == pytest.approx([factor] * 3)


def test_a_ratio_is_of_the_means_and_its_interval_covers_the_truth_as_often_as_it_says() -> None:
    assert ratio([1.0, 3.0], [1.0, 1.0]).value == 2
    rng, trials = np.random.default_rng(0), 2000
    covered = 0
    for _ in range(trials):
        below = rng.uniform(0.5, 1.5, 30)
        found = ratio((2 * below * rng.uniform(0.5, 1.5, 30)).tolist(), below.tolist())  # 2 on average
        assert found.low is not None and found.high is not None
        covered += found.low <= 2 <= found.high
    # Approximate at 30 images: from 93% to 97% of 2,000 trials, 4 standard errors around 95%.
    assert 0.93 < covered / trials < 0.97


def test_an_interval_ends_at_the_range_of_the_number() -> None:
    whole = mean([0.0, 1.0])
    assert whole.low is not None and whole.low < 0
    assert mean([0.0, 1.0], 0, 1) == Interval(0.5, 0, 1, 2)


def test_what_is_not_a_number_is_left_out_and_one_image_has_no_interval() -> None:
    assert mean([1.0, math.nan]) == Interval(1.0, None, None, 1)
    assert mean([math.nan]) == Interval(None, None, None, 0)
    assert ratio([1.0, math.nan, 3.0], [2.0, 1.0, 2.0]).images == 2
    assert ratio([1.0], [2.0]) == Interval(0.5, None, None, 1)
    assert ratio([1.0, 1.0], [0.0, 0.0]) == Interval(None, None, None, 2)
