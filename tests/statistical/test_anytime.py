"""Statistical tests of the procedures: error probabilities by exact dynamic programming, not by simulation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from savings import simulate
from scipy import stats

from bench.smoothing import bounds
from bench.smoothing.anytime import Anytime, Floats, calibration, log_wealth, mixture, schedule, tabulate
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import Counts, Decision, ImageProcedure, Target, VoteRequest

RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CONFIG = Anytime(n0=100, n=100_000, alpha=0.001, radii=RADII)
VILLE = replace(CONFIG, calibration="ville", futility=0.18)  # as until certbench 0.2.0, and beyond the exact limits
BOTH = pytest.mark.parametrize("design", [CONFIG, VILLE], ids=["exact", "ville"])


def play(procedure: ImageProcedure, draw: dict[str, list[list[int]]]) -> Decision:
    """Answer a procedure's requests from lists of counts, and check that each has the requested votes."""
    queue = {purpose: iter(counts) for purpose, counts in draw.items()}
    answer: VoteRequest | Decision = procedure.first()
    while isinstance(answer, VoteRequest):
        counts = np.array(next(queue[answer.purpose]), np.int64)
        assert counts.sum() == answer.count
        answer = procedure.update(counts)
    return answer


def two_class(hits: list[int], looks: list[int]) -> list[list[int]]:
    """Counts of class 0, class 1 and NaN per request, from the total votes for class 0 at each look."""
    steps = zip(np.diff(hits, prepend=0).tolist(), np.diff(looks, prepend=0).tolist(), strict=True)
    return [[h, n - h, 0] for h, n in steps]


def crossing(looks: list[int], accept: list[int], p: float) -> float:
    """Exact probability that the votes for the class ever reach ``accept``, when each has probability p."""
    alive, crossed, before = np.ones(1), 0.0, 0
    low = 0  # alive[i] is the probability of low + i votes so far and no crossing
    for look, bar in zip(looks, accept, strict=True):
        step = look - before
        alive = np.convolve(alive, stats.binom.pmf(np.arange(step + 1), step, p))
        crossed += alive[max(0, bar - low) :].sum()
        alive, before = alive[: max(0, bar - low)], look
        # Mass below 1e-18 is dropped from the bottom and counted as crossed: the result is an upper bound.
        cut = int(np.searchsorted(np.cumsum(alive), 1e-18))
        crossed += alive[:cut].sum()
        alive, low = alive[cut:], low + cut
    return float(crossed)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_false_certificates_at_the_boundary_with_a_look_at_every_vote(alpha: float) -> None:
    config = replace(VILLE, n=3000, alpha=alpha, step=1, growth=0.0)
    tables = tabulate(config, 0.5)
    assert len(tables.looks) == 2999 and tables.p0[0] == pytest.approx(0.5) and len(tables.p0) >= 5
    for k, p0 in enumerate(tables.p0):
        errors = crossing(tables.looks, [row[k] for row in tables.accept], p0)
        assert 0.2 * alpha < errors <= alpha  # at most alpha, and not by wasting most of it
        below = crossing(tables.looks, [row[k] for row in tables.accept], p0 - 0.01)
        assert below < errors


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
@BOTH
def test_false_certificates_of_the_shipped_looks(sigma: float, design: Anytime) -> None:
    tables = tabulate(design, sigma)
    for k, (p0, stated) in enumerate(zip(tables.p0, tables.errors, strict=True)):
        assert crossing(tables.looks, [row[k] for row in tables.accept], p0) <= stated <= design.alpha


@pytest.mark.parametrize("n", [50, 1000, 100_000])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
@BOTH
def test_no_radius_above_clopper_pearson_at_the_decisive_look(n: int, sigma: float, design: Anytime) -> None:
    config = replace(design, n=n)
    tables = tabulate(config, sigma)
    for look, row in zip(tables.looks, tables.accept, strict=True):
        assert row == sorted(row)
        for hits, radius, p0 in zip(row, tables.radii, tables.p0, strict=True):
            if hits <= look:
                full = bounds.lower_bound(hits, look, config.alpha)
                assert full >= p0 and bounds.radius(full, sigma) >= radius


@given(st.integers(0, 10**9), st.floats(0.3, 1.0), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.03]))
@BOTH
@settings(max_examples=100, deadline=None)
def test_procedure_equals_simulator_and_radius_is_recomputed(
    design: Anytime, seed: int, p: float, sigma: float, tau: float
) -> None:
    config = replace(design, target="label", n=20_000)
    tables = tabulate(config, sigma, tau)
    steps = np.diff(tables.looks, prepend=0)
    hits: Counts = np.cumsum(np.random.default_rng(seed).binomial(steps, p))
    drawn = iter(np.diff(hits, prepend=0).tolist())
    level, votes, at_stop = simulate(tables, lambda _, running: np.array([next(drawn) for _ in running]), 1)
    assert at_stop[0] == hits[tables.looks.index(int(votes[0]))]
    decision = play(config.certify(sigma, 0, tau), {"estimate": two_class(hits.tolist(), tables.looks)})
    assert (decision.p_lower, decision.radius) == tables.result(int(level[0]))
    assert decision.votes == votes[0] >= decision.n
    assert config.recompute(sigma, decision.n, decision.top_count, tau) == (decision.p_lower, decision.radius)
    assert (decision.predicted is None) == (decision.p_lower <= 0.5)
    assert decision.radius <= bounds.radius(bounds.lower_bound(decision.top_count, decision.n, config.alpha), sigma)
    assert decision.top_count + decision.runner_up_count == decision.n


@given(st.integers(0, 10**9), st.floats(0.5, 1.0))
@settings(max_examples=50, deadline=None)
def test_the_recorded_look_is_the_first_to_reach_the_level(seed: int, p: float) -> None:
    """Later looks that certify no larger radius are not recorded."""
    config = replace(CONFIG, target="label", n=20_000)
    tables = tabulate(config, 0.5)
    hits = np.cumsum(np.random.default_rng(seed).binomial(np.diff(tables.looks, prepend=0), p)).tolist()
    decision = play(config.certify(0.5, 0), {"estimate": two_class(hits, tables.looks)})
    if decision.predicted is None:
        assert decision.n == decision.votes
        return
    level = tables.radii.index(decision.radius)
    first = next(i for i, accept in enumerate(tables.accept) if hits[i] >= accept[level])
    assert (decision.n, decision.top_count) == (tables.looks[first], hits[first])


def test_a_later_look_that_certifies_nothing_more_is_not_recorded() -> None:
    """The same for a history in which every look just certifies the smallest radius."""
    config = replace(CONFIG, target="label", n=20_000)
    tables = tabulate(config, 0.5)
    hits = [accept[0] for accept in tables.accept]
    decision = play(config.certify(0.5, 0), {"estimate": two_class(hits, tables.looks)})
    assert (decision.n, decision.top_count, decision.radius) == (64, hits[0], 0.0)
    assert decision.predicted == 0 and decision.votes > 64


@pytest.mark.parametrize(
    "config", [Fixed(10, 1000, 0.001), replace(CONFIG, n=1000, radii=tuple(k / 8 for k in range(1, 19)))]
)
@pytest.mark.parametrize("target", ["selected", "label"])
def test_votes_that_all_agree_reach_the_largest_radius(config: Fixed | Anytime, target: Target) -> None:
    config, largest = replace(config, target=target), []
    for tau in (0.0, 0.05):
        procedure = config.certify(1.0, 0, tau)
        decision: VoteRequest | Decision = procedure.first()
        while isinstance(decision, VoteRequest):
            decision = procedure.update(np.array([decision.count, 0, 0]))
        assert decision.radius == config.largest_radius(1.0, tau)
        found = config.recompute(1.0, decision.n, decision.top_count, tau)
        assert found == (decision.p_lower, decision.radius)
        assert 0 < decision.radius <= bounds.radius(bounds.lower_bound(1000, 1000, config.alpha) - tau, 1.0)
        largest.append(decision.radius)
    assert largest[1] < largest[0]


def test_a_radius_waits_for_all_lower_ones() -> None:
    """On this grid the count that W needs falls with the radius: at 224 votes from 224 to 223."""
    radii = (*(0.15 * k for k in range(1, 13)), 1.895, 1.9, 2.09, 2.095, 2.385, 2.39)
    config = replace(VILLE, n=1000, alpha=0.05, radii=radii, target="label")
    tables, enough = tabulate(config, 1.0), math.log(1 / (0.8 * 0.05))
    low, high = (tables.radii.index(r) for r in (1.895, 1.9))
    votes, hits = np.array(224), np.array(223)
    for level, passes in ((low, False), (high, True)):
        p0 = tables.p0[level]
        assert (log_wealth(p0, mixture(config, p0), hits, votes) > enough) == passes
    assert all(row == sorted(row) for row in tables.accept)
    assert config.recompute(1.0, 224, 223)[1] == pytest.approx(1.8)
    assert config.recompute(1.0, 224, 224)[1] >= 1.9
    agreed = [look - (look >= 224) for look in tables.looks]
    decision = play(config.certify(1.0, 0), {"estimate": two_class(agreed, tables.looks)})
    assert decision.radius >= 2.09 and decision.n > 224


def test_lowest_first() -> None:
    """A count that certifies a radius certifies all lower ones at the same look."""
    fine = replace(VILLE, radii=tuple(k / 100 for k in range(1, 120)), n=5000)
    tables = tabulate(fine, 0.5)
    accept, looks = np.array(tables.accept[:-1]), np.array(tables.looks[:-1])  # at the cap Clopper-Pearson joins in
    assert (np.diff(accept, axis=1) >= 0).all()
    for k, p0 in enumerate(tables.p0):
        for column in (hits for hits in accept[:, k:].T if (hits <= looks).any()):
            wealth = log_wealth(p0, mixture(fine, p0), column, looks)[column <= looks]
            assert (wealth >= math.log(1 / (fine.ville_share * fine.alpha))).all()


def test_wealth_against_high_precision_and_without_overflow() -> None:
    mpmath.mp.dps = 60
    for n, p0 in itertools.product((1_500, 100_000, 10_000_000), (0.5, 0.8413447, 0.99865, 0.9999)):
        config = replace(VILLE, n=n)
        alternatives: Floats = mixture(config, p0)
        assert 1 <= len(alternatives) <= 16 and (alternatives > p0).all() and (alternatives < 1).all()
        for hits in (0, n // 2, round(n * p0) + 1, n):
            terms = [mpmath.mpf(q) ** hits * (1 - mpmath.mpf(q)) ** (n - hits) for q in alternatives.tolist()]
            null = mpmath.mpf(p0) ** hits * (1 - mpmath.mpf(p0)) ** (n - hits)
            exact = mpmath.log(mpmath.fsum(terms) / len(terms) / null)
            computed = float(log_wealth(p0, alternatives, np.array(hits), np.array(n)))
            assert abs(computed - float(exact)) < 1e-7 * max(1.0, abs(float(exact)) * 1e-5)
    assert tabulate(replace(VILLE, n=10_000_000), 0.25).radii == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_thresholds_are_rounded_up() -> None:
    mpmath.mp.dps = 40
    for sigma, tau in itertools.product((0.12, 0.25, 0.5, 1.0), (0.0, 1e-9)):
        tables = tabulate(CONFIG, sigma, tau)
        for radius, p0 in zip(tables.radii, tables.p0, strict=True):
            assert 0 < p0 - mpmath.ncdf(mpmath.mpf(radius) / mpmath.mpf(sigma)) < 3e-11


@pytest.mark.parametrize("tau", [1e-9, 1e-3])
@BOTH
def test_noise_error_is_charged_to_the_thresholds(tau: float, design: Anytime) -> None:
    config = replace(design, n=3000)
    tables = tabulate(config, 0.5, tau)
    for k, p0 in enumerate(tables.p0):
        assert crossing(tables.looks, [row[k] for row in tables.accept], p0 + tau) <= config.alpha
    plain = Fixed(100, 1000, 0.001).recompute(0.5, 1000, 900)
    charged = Fixed(100, 1000, 0.001).recompute(0.5, 1000, 900, tau)
    assert charged[0] == plain[0] - tau and charged[1] < plain[1]


def test_fixed_equals_cohen() -> None:
    fixed = Fixed(n0=10, n=1000, alpha=0.001)
    for hits in (0, 400, 500, 549, 550, 999, 1000):
        decision = play(fixed.certify(0.5, 0), {"select": [[6, 4, 0]], "estimate": [[hits, 1000 - hits, 0]]})
        lower = stats.binomtest(hits, 1000).proportion_ci(1 - 2 * fixed.alpha).low if hits else 0.0
        radius = 0.5 * stats.norm.ppf(lower) if lower > 0.5 else 0.0
        assert decision.p_lower == pytest.approx(lower, rel=1e-9) and decision.p_lower <= lower
        assert decision.radius == pytest.approx(radius, rel=1e-9, abs=1e-10) and decision.radius <= radius
        assert decision.predicted == (0 if lower > 0.5 else None)
        assert fixed.recompute(0.5, decision.n, decision.top_count) == (decision.p_lower, decision.radius)
        assert (decision.n0, decision.n, decision.votes) == (10, 1000, 1010)
    with pytest.raises(ValueError, match="decides at 1000"):
        fixed.recompute(0.5, 999, 900)


def test_nan_votes_count_against_the_class() -> None:
    decision = play(Fixed(10, 100, 0.001).certify(0.5, 0), {"select": [[1, 0, 9]], "estimate": [[60, 3, 37]]})
    assert decision.predicted is None and decision.top_count == 60
    assert (decision.runner_up, decision.runner_up_count) == (2, 37)
    config = replace(CONFIG, n=1000, n0=10)
    looks = tabulate(config, 0.5).looks
    steps = np.diff(looks, prepend=0).tolist()
    half = [[step // 2, 0, step - step // 2] for step in steps]
    decision = play(config.certify(0.5, 0), {"select": [[0, 1, 9]], "estimate": half})
    assert decision.predicted is None and decision.radius == 0 and decision.top_count == 0  # class 1 was tested
    decision = play(config.certify(0.5, 0), {"select": [[1, 0, 9]], "estimate": half})
    assert decision.predicted is None and decision.runner_up == 2


def test_selected_and_label_target() -> None:
    sure = {
        "select": [[0, 100, 0]],
        "estimate": [[0, int(n), 0] for n in np.diff(tabulate(CONFIG, 0.5).looks, prepend=0)],
    }
    decision = play(CONFIG.certify(0.5, label=0), sure)
    assert (decision.predicted, decision.radius, decision.n0, decision.runner_up) == (1, 1.5, 100, None)
    assert decision.votes == decision.n + 100 < 10_000
    label = replace(CONFIG, target="label")
    assert label.certify(0.5, label=0).first() == VoteRequest("estimate", 64, CONFIG.n - 64)
    decision = play(label.certify(0.5, label=0), {"estimate": sure["estimate"]})
    assert (decision.predicted, decision.radius, decision.n0, decision.votes) == (None, 0.0, 0, 64)


def test_looks_are_those_of_the_constants() -> None:
    assert schedule(replace(CONFIG, n=1000)).tolist() == [*range(64, 1000, 32), 1000]
    looks = schedule(CONFIG).tolist()
    for now, later in itertools.pairwise(looks[:-1]):
        gap = later - now
        assert gap % 32 == 0 and gap >= 0.02 * now and (gap == 32 or gap - 32 < 0.02 * now)
    assert looks[-1] == CONFIG.n and schedule(replace(CONFIG, n=64)).tolist() == [64]


def test_accepted_counts_are_the_first_that_are_enough() -> None:
    """Before the cap W alone decides: at the smallest radius one vote fewer does not suffice."""
    tables = tabulate(VILLE, 0.5)
    column, looks = np.array(tables.accept)[:-1, 0], np.array(tables.looks[:-1])
    p0, enough = tables.p0[0], math.log(1 / (VILLE.ville_share * VILLE.alpha))
    assert (column <= looks).all()
    assert (log_wealth(p0, mixture(VILLE, p0), column, looks) >= enough).all()
    assert (log_wealth(p0, mixture(VILLE, p0), column - 1, looks) < enough + 2e-6).all()


def test_radius_zero_is_the_first_threshold() -> None:
    tables = tabulate(replace(CONFIG, radii=(2.0,)), 0.5)
    assert tables.radii == (0.0,)  # 2.0 at sigma .5 is out of reach, so it is dropped
    config = replace(CONFIG, radii=(2.0,), target="label")
    hits = [round(0.6 * look) for look in tables.looks]
    decision = play(config.certify(0.5, 0), {"estimate": two_class(hits, tables.looks)})
    assert (decision.predicted, decision.radius) == (0, 0.0) and decision.p_lower > 0.5
    assert config.largest_radius(0.5) == 0.0


def test_radii_are_the_nominal_ones() -> None:
    radii = tuple(0.1 * k for k in range(1, 8))  # .30000000000000004, as in the report, not a recomputed .3
    tables = tabulate(replace(CONFIG, radii=radii), 0.25)
    assert tables.radii == (0.0, *radii)


@pytest.mark.parametrize("n", [1, 5, 9, 10, 33, 64, 65])
@BOTH
def test_few_votes(n: int, design: Anytime) -> None:
    """The exact test needs as many votes as one Clopper-Pearson test at the same alpha: 10."""
    config = replace(design, n=n, target="label")
    looks = tabulate(config, 0.5).looks
    decision = play(config.certify(0.5, 0), {"estimate": two_class(looks, looks)})
    alpha = 0.001 if design is CONFIG else 0.0002
    assert (decision.predicted == 0) == (bounds.lower_bound(n, n, alpha) > 0.5 or n >= 64)
    assert decision.n <= decision.votes <= n
    assert config.recompute(0.5, decision.n, decision.top_count) == (decision.p_lower, decision.radius)


def test_invalid_arguments_raise() -> None:
    with pytest.raises(ValueError, match="not a look"):
        CONFIG.recompute(0.5, 65, 60)
    with pytest.raises(ValueError, match="not a look"):
        CONFIG.recompute(0.5, 64, 65)
    with pytest.raises(ValueError, match="rising"):
        replace(CONFIG, radii=(0.5, 0.25))
    with pytest.raises(ValueError, match="rising"):
        replace(CONFIG, radii=(0.0, 0.25))


def test_the_tables_of_0_2_0_are_unchanged() -> None:
    """Looks with their acceptance and give-up counts, as certbench 0.2.0 computed them (commit c3ac4f2)."""
    expected = {
        (1000, 0.5): {
            64: ([48, 58, 64, 65, 65], [29, 41, 52, 59, 62]),
            224: ([142, 182, 209, 222, 225], [114, 157, 191, 211, 220]),
            800: ([459, 607, 715, 774, 797], [431, 582, 696, 762, 793]),
            1000: ([557, 743, 882, 960, 993], [557, 743, 882, 960, 993]),
        },
        (100_000, 0.25): {
            64: ([49, 64, 65, 65], [22, 46, 59, 63]),
            224: ([144, 210, 225, 225], [95, 176, 213, 222]),
            800: ([460, 715, 797, 801], [374, 654, 774, 797]),
            100_000: ([50561, 84543, 97891, 99905], [50561, 84543, 97891, 99905]),
        },
    }
    for (n, sigma), rows in expected.items():
        tables = tabulate(replace(VILLE, n=n, radii=(0.25, 0.5, 0.75, 1.0)), sigma)
        for look, row in rows.items():
            at = tables.looks.index(look)
            assert (tables.accept[at], tables.give_up[at]) == row
        assert set(tables.errors) == {VILLE.alpha}


@pytest.mark.parametrize("n", [10_001, 10**6 + 1, 10**9])
def test_tables_too_large_to_be_exact_are_refused(n: int) -> None:
    radii = tuple(k / 1000 for k in range(1, 2000)) if n < 10**6 else RADII
    assert calibration(n, 0.001, radii) == "ville" and calibration(10**4, 0.001, radii) == "exact"
    with pytest.raises(ValueError, match="use ville"):
        Anytime(100, n, 0.001, radii)
    with pytest.raises(ValueError, match="use ville"):
        replace(CONFIG, alpha=1e-13)
    assert Anytime(100, n, 0.001, radii, calibration="ville").n == n
