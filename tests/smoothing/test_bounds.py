"""Bounds and radii compared with mpmath: always rounded to the safe side."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from bench.smoothing import bounds
from bench.smoothing.anytime import Anytime, Floats, tabulate
from bench.smoothing.fixed import Fixed


def tail(p: float, top: int, n: int) -> mpmath.mpf:
    """P(Bin(n, p) >= top), its terms summed at 50 digits (mpmath's own betainc loses its way beyond n = 1e4)."""
    with mpmath.workdps(50):
        term = density(p, top, n) * mpmath.mpf(p) / top
        total, ratio = term, mpmath.mpf(p) / (1 - mpmath.mpf(p))
        for k in range(top, n):
            term *= ratio * (n - k) / (k + 1)
            total += term
            if term < total * mpmath.mpf(10) ** -40 and k > n * p:
                break
        return total


def density(p: float, top: int, n: int) -> mpmath.mpf:
    """How fast that tail grows with p."""
    with mpmath.workdps(50):
        x, log = mpmath.mpf(p), mpmath.loggamma
        return mpmath.exp(
            log(n + 1) - log(top) - log(n - top + 1) + (top - 1) * mpmath.log(x) + (n - top) * mpmath.log(1 - x)
        )


@pytest.mark.parametrize("n", [1, 2, 100, 1000, 100_000, 10**7])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.51, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6])
def test_lower_bound_is_below_the_exact_one_and_close(n: int, share: float, alpha: float) -> None:
    top = round(share * n)
    p = bounds.lower_bound(top, n, alpha)
    if top == 0:
        assert p == 0
        return
    if top == n:
        with mpmath.workdps(40):
            exact = mpmath.mpf(alpha) ** (mpmath.mpf(1) / n)
        assert exact * (1 - 1e-9) <= p <= exact
        return
    # The tail grows with p, so these two place the exact bound between p and p (1 + 2 SLACK).
    assert tail(p, top, n) <= alpha
    assert tail(p * (1 + 2 * bounds.SLACK), top, n) >= alpha


@given(n=st.integers(1, 10**6), data=st.data())
@settings(max_examples=200, deadline=None)
def test_lower_bound_grows_with_successes_and_shrinks_with_alpha(n: int, data: st.DataObject) -> None:
    top = data.draw(st.integers(0, n - 1))
    assert 0 <= bounds.lower_bound(top, n, 0.001) <= bounds.lower_bound(top + 1, n, 0.001) < 1
    assert bounds.lower_bound(top, n, 1e-6) <= bounds.lower_bound(top, n, 0.01) <= top / n + 1e-12


@given(p=st.floats(0.4, 1 - 1e-12), sigma=st.floats(1e-3, 10))
@settings(max_examples=300, deadline=None)
def test_radius_is_below_the_exact_one_and_close(p: float, sigma: float) -> None:
    r = bounds.radius(p, sigma)
    if p <= 0.5:
        assert r == 0
        return
    with mpmath.workdps(40):
        exact = mpmath.mpf(sigma) * mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)
        assert exact - 1e-9 * (sigma + exact) <= r <= exact or r == 0


def test_largest_radii_are_the_published_ones() -> None:
    # Largest R/sigma at alpha .001 for n = 1e2 .. 1e5 (three decimals).
    found = [Fixed(100, 10**k, 0.001).largest_radius(1.0) for k in (2, 3, 4, 5)]
    assert [round(r, 3) for r in found] == [1.5, 2.463, 3.199, 3.811]


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_smallest_n_is_the_first_that_certifies(alpha: float) -> None:
    n = bounds.smallest_n(alpha)
    assert bounds.lower_bound(n, n, alpha) > 0.5
    assert n == 1 or bounds.lower_bound(n - 1, n - 1, alpha) <= 0.5


@given(n=st.integers(1, 5000), data=st.data())
@settings(max_examples=100, deadline=None)
def test_interval_agrees_with_scipy(n: int, data: st.DataObject) -> None:
    from scipy.stats import binomtest

    k = data.draw(st.integers(0, n))
    theirs = binomtest(k, n).proportion_ci(0.95, method="exact")
    assert bounds.interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_interval_without_votes_is_all_of_0_to_1() -> None:
    assert bounds.interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("top", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(top: int, n: int) -> None:
    with pytest.raises(ValueError, match="top_count"):
        bounds.lower_bound(top, n, 0.001)


def test_slack_covers_the_error_of_the_quantile() -> None:
    """Every bound is lowered by a hundred times the largest error of scipy's quantile seen on this grid."""
    worst = 0.0
    for n in (100, 1000, 100_000, 10**7):
        for share in (0.3, 0.5, 0.501, 0.9, 0.9999):
            top = round(share * n)
            if top == n:
                continue
            p = float(special.betaincinv(top, n - top + 1, 0.001))
            worst = max(worst, abs(float((tail(p, top, n) - mpmath.mpf("0.001")) / density(p, top, n) / p)))
    assert 0 < worst < bounds.SLACK / 100


@given(radius=st.floats(0, 1e29), places=st.integers(1, 8))
def test_printed_radii_are_rounded_down_and_reaches_up(radius: float, places: int) -> None:
    """Compared as exact fractions, so that the comparison does not round either."""
    below, above = bounds.printed_radius(radius, places), bounds.printed_reach(radius, places)
    unit = Fraction(1, 10**places)
    assert Fraction(radius) - unit < Fraction(below) <= Fraction(radius) <= Fraction(above) < Fraction(radius) + unit
    assert all(len(text.partition(".")[2]) == places for text in (below, above))


def test_printed_radii_by_example() -> None:
    assert (bounds.printed_radius(0.213998), bounds.printed_reach(0.551297)) == ("0.213", "0.552")
    assert (bounds.printed_radius(0.5), bounds.printed_reach(0.5)) == ("0.500", "0.500")
    assert (bounds.printed_radius(0.3), bounds.printed_reach(0.3)) == ("0.299", "0.300")  # the float is below 0.3


def randomized(hits: Floats, n: int, u: Floats) -> Floats:
    """The bound p with P(H > hits) + u P(H = hits) = .001, by bisection; u = 1 is Clopper-Pearson."""
    low = np.zeros(np.broadcast(hits, u).shape)
    high = np.ones_like(low)
    for _ in range(45):
        p = (low + high) / 2
        more = np.where(hits < n, special.betainc(np.minimum(hits + 1, n), np.maximum(n - hits, 0.5), p), 0.0)
        small = (1 - u) * more + u * special.betainc(hits, n - hits + 1, p) <= 0.001
        low, high = np.where(small, p, low), np.where(small, high, p)
    return low


@pytest.mark.parametrize(
    ("n", "gains"),
    [(1000, (0.0025, 0.012, 0.062)), (10_000, (0.0003, 0.0016, 0.05)), (100_000, (0.00003, 0.0002, 0.043))],
)
def test_what_randomized_clopper_pearson_would_gain(n: int, gains: tuple[float, ...]) -> None:
    """As docs/certification.md states: the mean radius gained, in sigma, at p = .9, .99 and 1 and fixed n."""
    u = (np.arange(20) + 0.5) / 20
    for p, stated in zip((0.9, 0.99, 1.0), gains, strict=True):
        hits = np.arange(max(1, n // 2), n + 1, dtype=float)
        weights = stats.binom.pmf(hits, n, p)
        hits, weights = hits[weights > 1e-6, None], weights[weights > 1e-6]
        plain = special.ndtri(randomized(hits, n, np.ones((1, 1))))
        assert plain[-1, 0] == pytest.approx(
            bounds.radius(bounds.lower_bound(int(hits[-1, 0]), n, 0.001), 1.0), rel=1e-6
        )
        gain = float((weights[:, None] * (special.ndtri(randomized(hits, n, u[None])) - plain)).sum()) / len(u)
        assert gain == pytest.approx(stated, rel=0.2)


def test_what_randomizing_could_still_spend() -> None:
    """All that it could use is the alpha that the exact anytime tables leave unspent: docs/certification.md."""
    for n, most, least in ((1000, 2.0, 0.96), (10_000, 3.0, 0.92), (100_000, 3.5, 0.96)):
        config = Anytime(100, n, 0.001, tuple(k / 4 for k in range(1, round(4 * most) + 1)))
        tables = tabulate(config, 1.0)
        assert tables.radii[-1] == most
        assert min(tables.errors) >= least * config.alpha
