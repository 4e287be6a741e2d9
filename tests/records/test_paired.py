"""Tests and intervals of paired results: against brute force, published numbers, and exact coverage."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from bench.records import metrics, paired
from bench.records.record import read_run
from bench.report import tables
from bench.smoothing import bounds
from tests.helpers.records import made_up

DIFFERENCES = st.lists(st.integers(-6, 6), min_size=1, max_size=11)


@given(differences=DIFFERENCES)
@settings(max_examples=60)
def test_sign_flip_counts_every_choice_of_signs(differences: list[int]) -> None:
    d = np.array(differences)
    extreme = [abs(int(d @ signs)) >= abs(d.sum()) for signs in itertools.product((1, -1), repeat=len(d))]
    assert paired.sign_flip(d) == pytest.approx(np.mean(extreme), abs=1e-12)


@given(first=st.integers(0, 300), second=st.integers(0, 300), seeds=st.integers(1, 5), same=st.integers(0, 9))
def test_seeds_that_agree_give_mcnemars_p(first: int, second: int, seeds: int, same: int) -> None:
    """Repeating every run with another seed and the same results changes no verdict."""
    d = seeds * np.array([1] * first + [-1] * second + [0] * same, np.int64)
    assert paired.sign_flip(d) == paired.mcnemar(first, second)


def test_sign_flip_of_many_images_agrees_with_the_normal_limit() -> None:
    rng = np.random.default_rng(0)
    d = rng.integers(-3, 4, 20_000)
    assert paired.sign_flip(d) == pytest.approx(2 * stats.norm.sf(abs(d.sum()) / math.sqrt((d**2).sum())), abs=0.005)


def any_called_different(right: list[np.ndarray], seeds: int) -> bool:
    totals = [r.sum() for r in right]
    return min(paired.worse_than_best(right, [seeds] * len(right), int(np.argmax(totals)))) < paired.LEVEL


@pytest.mark.parametrize(("seeds", "columns"), [(1, 400), (2, 150)])
def test_eighteen_equal_methods_are_rarely_called_different(seeds: int, columns: int) -> None:
    """Any row of a column is called different in at most 5% of the columns.

    Images differ in difficulty, methods are equal on each: the null hypothesis of every pair. At a true rate of
    exactly 5% the number of columns with a false claim exceeds the limit below with probability at most 1e-4; the
    seed is fixed, so that the test gives the same result on every run.
    """
    rng = np.random.default_rng(14)
    wrong = 0
    for _ in range(columns):
        difficulty = rng.beta(0.8, 0.8, 100)
        right = [rng.binomial(seeds, difficulty) for _ in range(18)]
        wrong += any_called_different(right, seeds)
    assert wrong <= stats.binom.isf(1e-4, columns, paired.LEVEL)


def test_a_clearly_worse_method_is_found_among_eighteen() -> None:
    """63% against 90% on 100 images: found in all of 20 columns. McNemar's p is about 1e-5, of 153 pairs."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        right = [(rng.random(100) < (0.35 if m == 5 else 0.9)).astype(np.int64) for m in range(18)]
        best = int(np.argmax([r.sum() for r in right]))
        assert paired.worse_than_best(right, [1] * 18, best)[5] < paired.LEVEL


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_more_seeds_do_not_weaken_a_clear_verdict(tmp_path: Path, seeds: int) -> None:
    """lora certifies about 63 of 100 images at r = .25, none 10, each seed somewhat other ones."""
    for seed in range(seeds):
        made_up(tmp_path, [0.3] * (63 + seed) + [0.1] * (37 - seed), name="lora", seed=seed)
        made_up(tmp_path, [0.3] * (10 - seed) + [0.1] * (90 + seed), name="none", seed=seed)
    (table,) = tables.build(tables.load_records(tmp_path)[0]).tables
    assert not any(0.25 in method.level for method in table.methods)
    shares = {method.row.defense: method.row.certified[0.25] for method in table.methods}
    assert shares["lora"].low > shares["none"].high
    for share in shares.values():
        exact = bounds.interval(share.value * 100, 100)
        assert (share.low, share.high) == pytest.approx(exact) and share.high - share.low < 0.2
    said = table.notes
    if seeds == 1:
        assert "(ranges: 95% Clopper-Pearson intervals)" in said
    else:
        assert "95% Clopper-Pearson intervals at the mean over seeds" in said
        assert "not for the choice of seeds" in said and f"differ by up to {seeds - 1}.0 points" in said
        assert "exact sign-flip (with one seed McNemar)" in said


def test_pooled_shares_are_means_over_the_same_images(tmp_path: Path) -> None:
    """Two seeds that hold different images, recorded in another order."""
    one = read_run(made_up(tmp_path, [0.3, 0.3, 0.1, None], indices=[0, 1, 2, 3]))
    two = read_run(made_up(tmp_path, [0.3, 0.1, None, 0.3], indices=[3, 2, 1, 0], seed=1))
    runs = [one.certificates, two.certificates]
    at_zero, within = metrics.pooled(runs, [0.0, 0.25])
    assert (at_zero.value, within.value) == (0.75, 0.5)
    assert (within.low, within.high) == pytest.approx(bounds.interval(2, 4))
    assert metrics.pooled_abstention(runs).value == 0.25
    assert metrics.pooled(runs, [0.25], label=0)[0].value == 1.0


@pytest.mark.parametrize("images", [20, 60, 120])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.63, 0.97])
@pytest.mark.parametrize("disagree", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_the_interval_of_two_seeds_covers(images: int, share: float, disagree: float) -> None:
    """Exact coverage of the 95% interval for two seeds, summed over all outcomes: at least 95%.

    ``disagree`` is the probability that an image is right with one seed alone, as a share of the most there can be.
    """
    one = 2 * min(share, 1 - share) * disagree
    both = share - one / 2
    ones, twos = np.meshgrid(np.arange(images + 1), np.arange(images + 1), indexing="ij")
    kept = ones + twos <= images
    counts = np.stack([ones[kept], twos[kept], (images - ones - twos)[kept]], -1)
    chance = stats.multinomial.pmf(counts, images, [one, both, max(0.0, 1 - one - both)])
    of_total = np.bincount(counts[:, 0] + 2 * counts[:, 1], chance)
    covered = 0.0
    for total, p in enumerate(of_total.tolist()):
        low, high = bounds.interval(total / 2, images)  # what pooled shows: the test above
        covered += p * (low <= share <= high)
    assert covered >= 0.95


def test_the_score_interval_of_a_published_example() -> None:
    """Airway hyper-responsiveness of 21 children before and after transplantation: 1 and 7 discordant.

    Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850-2875, give -0.517 to -0.026 for Tango's.
    """
    assert paired.score_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert paired.score_interval(1, 7, 21) == pytest.approx((0.026, 0.517), abs=5e-4)


@given(first=st.integers(0, 12), second=st.integers(0, 12), rest=st.integers(0, 30))
@settings(max_examples=40)
def test_the_score_interval_inverts_the_score_test(first: int, second: int, rest: int) -> None:
    """Against the test with its nuisance parameter found by numerical maximisation of the likelihood."""
    n = first + second + rest
    if n == 0:
        return
    low, high = paired.score_interval(first, second, n)

    def squared(difference: float) -> float:
        """The score statistic's square; ``p`` is the probability of 'first only' under the difference."""

        def unlikely(p: float) -> float:
            return -sum(
                c * math.log(max(q, 1e-300))
                for c, q in ((first, p), (second, p + difference), (rest, 1 - 2 * p - difference))
            )

        least, most = max(0.0, -difference), (1 - difference) / 2
        p = optimize.minimize_scalar(unlikely, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
        variance = (2 * p + difference - difference**2) / n
        return ((second - first) / n - difference) ** 2 / max(variance, 1e-300)

    assert -1 <= low <= (second - first) / n <= high <= 1
    for end, outside in ((low, -1e-3), (high, 1e-3)):
        if abs(end) < 0.998:
            assert squared(end - outside) <= paired.Z**2 * 1.01 + 0.01
            assert squared(end + outside) >= paired.Z**2 * 0.99 - 0.01


@pytest.mark.parametrize(
    ("n", "first", "second"),
    [(50, 0.02, 0.02), (50, 0.0, 0.04), (100, 0.01, 0.01), (100, 0.0, 0.02), (100, 0.02, 0.05), (60, 0.1, 0.3)],
)
def test_the_score_interval_covers(n: int, first: float, second: float) -> None:
    """Exact coverage, summed over all outcomes: at least 98% where at most two discordant images are expected.

    Elsewhere at least 93.5%: the interval is an approximation, whose coverage oscillates around 95% (worst of these
    .936). The percentile bootstrap that it replaced covered .866 where two discordant images are expected.
    """
    covered = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        if a + b > n:
            continue
        chance = stats.multinomial.pmf([a, b, n - a - b], n, [first, second, 1 - first - second])
        if chance > 1e-7:
            low, high = paired.score_interval(a, b, n)
            covered += chance * (low <= second - first <= high)
    assert covered >= (0.98 if n * (first + second) <= 2 else 0.935)


COUNTS = st.integers(0, 200)


@given(first=COUNTS, second=COUNTS)
def test_mcnemar_is_the_binomial_tail_counted_exactly(first: int, second: int) -> None:
    n = first + second
    tail = Fraction(sum(math.comb(n, k) for k in range(min(first, second) + 1)), 2**n)
    assert paired.mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


@pytest.mark.slow  # importing statsmodels takes seconds
@given(first=COUNTS, second=COUNTS, both=COUNTS, neither=COUNTS)
@settings(max_examples=25, deadline=None)
def test_mcnemar_agrees_with_statsmodels(first: int, second: int, both: int, neither: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[both, first], [second, neither]], exact=True).pvalue
    assert paired.mcnemar(first, second) == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.slow
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_holm_agrees_with_statsmodels(p: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    assert paired.holm(p) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12), level=st.floats(0.001, 1))
def test_holm_rejects_what_its_steps_reject(p: list[float], level: float) -> None:
    """Holm 1979: the smallest p first against level/m, the next against level/(m-1), stopping at the first failure."""
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if (len(p) - rank) * p[i] > level:
            break
        rejected.add(i)
    assert {i for i, v in enumerate(paired.holm(p)) if v <= level} == rejected | (
        set(range(len(p))) if level == 1 else set()
    )


def test_holm_by_hand() -> None:
    assert paired.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert paired.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@given(lost=st.integers(0, 120), won=st.integers(0, 120))
def test_the_test_is_one_sided_and_exact(lost: int, won: int) -> None:
    tail = Fraction(sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1)), 2 ** (lost + won))
    assert paired.loss(lost, won) == pytest.approx(float(tail), rel=1e-9)


@given(
    images=st.integers(1, 25),
    lost=st.integers(0, 10),
    won=st.integers(0, 10),
    level=st.sampled_from([0.01, 0.05, 0.3]),
    points=st.sampled_from([0.0, 2.0, 20.0]),
)
@settings(max_examples=30, deadline=None)
def test_power_is_the_sum_over_every_outcome(images: int, lost: int, won: int, level: float, points: float) -> None:
    a, b = lost / 20, won / 20
    expected = 0.0
    for x in range(images + 1):
        for y in range(images + 1 - x):
            if paired.regresses(x, y, images, paired.loss(x, y), level, points):
                ways = math.comb(images, x) * math.comb(images - x, y)
                expected += ways * a**x * b**y * (1 - a - b) ** (images - x - y)
    assert paired.power(images, a, b, level, points) == pytest.approx(expected, abs=1e-9)


def chance_shown(images: int, difference: float, churn: float, level: float) -> float:
    """Chance that the two-sided test shows the better classifier to be better, summed over every outcome."""
    better, worse = difference + churn / 2, churn / 2
    total = 0.0
    for x in range(images + 1):
        for y in range(min(x, images - x + 1)):
            if paired.mcnemar(x, y) <= level:
                ways = math.comb(images, x) * math.comb(images - x, y)
                total += ways * better**x * worse**y * max(0.0, 1 - better - worse) ** (images - x - y)
    return total


@pytest.mark.parametrize("images", [20, 50])
@pytest.mark.parametrize("churn", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("level", [0.05, 0.05 / 6])
def test_no_smaller_difference_than_the_one_stated_is_shown(images: int, churn: float, level: float) -> None:
    found = paired.smallest_shown(images, level, 0.8, churn)
    assert found is not None
    assert chance_shown(images, found, churn, level) >= 0.8
    below = [k / 1000 for k in range(round(1000 * found))]
    assert all(chance_shown(images, d, churn, level) < 0.8 for d in [*below[::40], *below[-3:]])


@pytest.mark.parametrize("images", [6, 100, 1000, 1_000_000])
def test_the_smallest_difference_of_nested_classifiers_has_a_closed_form(images: int) -> None:
    """At the 5% level 6 images must differ: 2 / 2^6 is below .05, 2 / 2^5 is not."""
    exact = float(special.betaincinv(6, images - 5, 0.8))
    assert paired.smallest_shown(images, 0.05, 0.8) == math.ceil(1000 * exact) / 1000


def test_too_few_images_show_nothing(tmp_path: Path) -> None:
    assert paired.smallest_shown(5, 0.05, 0.8) is None
    assert paired.smallest_shown(8, 0.05, 0.8, churn=0.5) is None  # half of the images are left to differ
    for count, said in (
        (5, "cannot show any difference"),
        (40, "could show at 80% power, at any one radius: at least"),
    ):
        made_up(tmp_path / str(count), [0.3] * count)
        (table,) = tables.build(tables.load_records(tmp_path / str(count))[0]).tables
        assert said in table.notes
    for name in ("two", "three"):
        made_up(tmp_path / "40", [0.3] * 40, name=name)
    (table,) = tables.build(tables.load_records(tmp_path / "40")[0]).tables
    best, usual = (paired.smallest_shown(40, 0.05 / 3, 0.8, churn) for churn in (0.0, 0.1))
    assert best and usual and f"at least {100 * best:.1f} points" in table.notes
    assert f"{100 * usual:.1f} points where 10%" in table.notes and "divided by 3 pairs" in table.notes
