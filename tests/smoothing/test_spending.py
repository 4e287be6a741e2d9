"""Exact acceptance counts, against exact arithmetic and against convolutions that leave nothing out."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import comb

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.smoothing.anytime import Anytime, Floats, Tables, schedule, tabulate
from bench.smoothing.spending import Counts, acceptance_counts

CONFIG = Anytime(n0=100, n=100_000, alpha=0.001, radii=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5))


def allowed(config: Anytime, looks: Counts) -> Floats:
    return config.alpha * (looks / config.n) ** config.spending


def spent(looks: list[int], counts: list[int], p: float) -> Floats:
    """Chance to have accepted by each look: full width, with scipy's binomial probabilities."""
    alive, crossed, before, found = np.ones(1), 0.0, 0, []
    for look, bar in zip(looks, counts, strict=True):
        alive = np.convolve(alive, stats.binom.pmf(np.arange(look - before + 1), look - before, p))
        crossed += float(alive[bar:].sum())
        alive[bar:] = 0
        before = look
        found.append(crossed)
    return np.array(found)


def spent_exactly(looks: list[int], counts: list[int], p: Fraction) -> list[Fraction]:
    """The same in rational arithmetic."""
    alive, crossed, before, found = {0: Fraction(1)}, Fraction(0), 0, []
    for look, bar in zip(looks, counts, strict=True):
        step, after = look - before, dict.fromkeys(range(look + 1), Fraction(0))
        for hits, chance in alive.items():
            for more in range(step + 1):
                after[hits + more] += chance * comb(step, more) * p**more * (1 - p) ** (step - more)
        crossed += sum((c for h, c in after.items() if h >= bar), Fraction(0))
        alive, before = {h: c for h, c in after.items() if h < bar}, look
        found.append(crossed)
    return found


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.floats(0.5, 0.999),
    st.sampled_from([1e-9, 0.001, 0.05, 0.3, 0.9]),
    st.sampled_from([0.3, 0.7, 2.0]),
)
@settings(max_examples=80, deadline=None)
def test_the_chance_is_an_upper_bound_in_rational_arithmetic(
    steps: list[int], p0: float, alpha: float, spending: float
) -> None:
    looks = np.cumsum(steps)
    limits = alpha * (looks / looks[-1]) ** spending
    counts, error = acceptance_counts(p0, looks, limits)
    exact = spent_exactly(looks.tolist(), counts.tolist(), Fraction(p0))
    assert exact[-1] <= Fraction(error) <= Fraction(alpha)
    assert all(x <= Fraction(limit) for x, limit in zip(exact, limits.tolist(), strict=True))
    assert Fraction(error) - exact[-1] <= Fraction(1, 10**8) * Fraction(alpha)
    assert (counts >= 0).all() and (counts <= looks + 1).all()


@given(
    st.integers(1, 4000),
    st.floats(0.1, 1.2),
    st.sampled_from([1e-6, 0.001, 0.01, 0.2]),
    st.sampled_from([0.0, 1e-9, 0.02]),
)
@settings(max_examples=25, deadline=None)
def test_no_radius_is_false_with_a_chance_above_alpha(n: int, sigma: float, alpha: float, tau: float) -> None:
    config = replace(CONFIG, n=n, alpha=alpha)
    tables = tabulate(config, sigma, tau)
    for k, (p0, error) in enumerate(zip(tables.p0, tables.errors, strict=True)):
        found = spent(tables.looks, [row[k] for row in tables.accept], p0 + tau)[-1]
        assert found <= error <= alpha
        below = spent(tables.looks, [row[k] for row in tables.accept], 0.99 * p0 + tau)[-1]
        assert below < found


@pytest.mark.parametrize("n", [1000, 10_000, 30_000])
@pytest.mark.parametrize("p0", [0.5, 0.8, 0.95, 0.99])
def test_all_of_alpha_is_spent_as_planned(n: int, p0: float) -> None:
    """Counts are the smallest allowed: one vote fewer at any look would spend more than is allowed there."""
    config = replace(CONFIG, n=n)
    looks = schedule(config)
    limits = allowed(config, looks)
    counts, error = acceptance_counts(p0, looks, limits)
    found = spent(looks.tolist(), counts.tolist(), p0)
    assert (found <= limits * (1 + 1e-9)).all()
    assert found[-1] <= error * (1 + 1e-9) and error <= found[-1] + 1e-8 * config.alpha
    assert error > (0.9 if p0 < 0.99 or n > 1000 else 0.8) * config.alpha
    alive, before = np.ones(1), 0
    for look, bar, total, limit in zip(looks.tolist(), counts.tolist(), found.tolist(), limits.tolist(), strict=True):
        alive = np.convolve(alive, stats.binom.pmf(np.arange(look - before + 1), look - before, p0))
        assert total + alive[bar - 1] > limit * (1 - 1e-7)
        alive[bar:], before = 0, look


@pytest.mark.parametrize(("sigma", "tau"), [(0.25, 0.0), (0.5, 1e-9)])
def test_the_chance_at_high_precision(sigma: float, tau: float) -> None:
    config = replace(CONFIG, n=300, alpha=0.01)
    tables = tabulate(config, sigma, tau)
    with mpmath.workdps(50):
        for k, p0 in enumerate(tables.p0):
            p, alive, crossed, before = mpmath.mpf(p0) + mpmath.mpf(tau), [mpmath.mpf(1)], mpmath.mpf(0), 0
            own, _ = acceptance_counts(p0 + tau, np.array(tables.looks), allowed(config, np.array(tables.looks)))
            for look, bar in zip(tables.looks, own.tolist(), strict=True):
                step = look - before
                pmf = [mpmath.binomial(step, j) * p**j * (1 - p) ** (step - j) for j in range(step + 1)]
                after = [mpmath.mpf(0)] * (len(alive) + step)
                for i, chance in enumerate(alive):
                    for j, q in enumerate(pmf):
                        after[i + j] += chance * q
                crossed += mpmath.fsum(after[bar:])
                alive, before = after[:bar], look
            stated = mpmath.mpf(tables.errors[k])
            assert crossed <= stated <= mpmath.mpf(config.alpha)
            assert stated - crossed < mpmath.mpf(config.alpha) / 10**8


def test_truncated_tails_are_charged() -> None:
    """Most of 64 votes agree with a chance of 1e-11: such counts are not followed, but accepted."""
    looks, limits = np.array([64, 128]), np.array([0.1, 0.3])
    counts, error = acceptance_counts(0.5, looks, limits)
    exact = spent_exactly(looks.tolist(), counts.tolist(), Fraction(1, 2))
    assert exact[-1] <= Fraction(error) < exact[-1] + Fraction(1, 10**9)


def false_by_the_rule(tables: Tables, p: float, true: int) -> float:
    """Chance that the whole rule, giving up included, certifies more than the ``true`` lowest radii."""
    n = tables.looks[-1]
    alive, false, before = [np.zeros(1) for _ in range(true + 1)], 0.0, 0
    alive[0][0] = 1
    for look, accept, give_up in zip(tables.looks, tables.accept, tables.give_up, strict=True):
        pmf = stats.binom.pmf(np.arange(look - before + 1), look - before, p)
        alive, before = [np.convolve(a, pmf) for a in alive], look
        hits = np.arange(look + 1)
        reached = np.searchsorted(accept, hits, side="right")
        after = [np.zeros(look + 1) for _ in alive]
        for level, chance in enumerate(alive):
            now = np.maximum(level, reached)
            false += float(chance[now > true].sum())
            for new in range(level, true + 1):
                on = (now == new) & (hits >= give_up[new]) & (look < n)
                after[new][on] += chance[on]
        alive = after
    return false


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_the_whole_rule_with_all_radii_and_giving_up(sigma: float) -> None:
    """Giving up can only lower the chance, and does not lower it to nothing."""
    config = replace(CONFIG, n=2000, alpha=0.01, radii=tuple(k / 8 for k in range(1, 12)))
    tables = tabulate(config, sigma)
    for k, (p0, error) in enumerate(zip(tables.p0, tables.errors, strict=True)):
        assert 0.2 * config.alpha < false_by_the_rule(tables, p0, k) <= error <= config.alpha


def test_the_cap_reaches_as_far_as_fixed_n() -> None:
    """Alpha that no earlier look could spend is left for the cap: the largest radius is that of one test."""
    for n in (10, 100, 1000, 10_000):
        for alpha in (0.001, 0.05):
            largest = alpha ** (1 / n)
            for p0, reachable in ((largest * (1 - 1e-8), True), (largest * (1 + 1e-8), False)):
                looks = np.array([n])
                if p0 >= 0.5:
                    counts, _ = acceptance_counts(p0, looks, np.array([alpha]))
                    assert (counts[-1] <= n) == reachable


def test_a_look_that_cannot_accept_needs_one_vote_more_than_it_has() -> None:
    looks = schedule(CONFIG)
    counts, error = acceptance_counts(0.999, looks, allowed(CONFIG, looks))
    assert counts[0] == 65 and 0 < error <= CONFIG.alpha
    assert (np.diff(counts) > 0).all()


def test_caps_at_the_limit_are_exact_too() -> None:
    config = replace(CONFIG, n=1_000_000)
    tables = tabulate(config, 0.5)
    assert len(tables.radii) == 7 and all(0.99 * config.alpha < e <= config.alpha for e in tables.errors)
