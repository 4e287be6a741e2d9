"""Expected votes of the anytime procedure, against every sequence of votes and against the procedure itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import special

from bench.smoothing.anytime import Anytime, tabulate
from bench.smoothing.expected import expected_votes, radius_costs
from bench.smoothing.votes import Decision, VoteRequest

SMALL = Anytime(5, 12, 0.2, (0.1, 0.3), "label", fastest=2, futility=0.4, step=1)
USUAL = Anytime(100, 10_000, 0.001, (0.25, 0.5, 0.75, 1.0), "label")


def votes_of(procedure: Anytime, votes: list[bool], sigma: float = 0.5) -> int:
    """Play one sequence of votes; return how many were used."""
    run, used = procedure.certify(sigma, 0), 0
    answer: VoteRequest | Decision = run.first()
    while isinstance(answer, VoteRequest):
        hits = sum(votes[used : used + answer.count])
        used += answer.count
        answer = run.update(np.array([hits, answer.count - hits, 0]))
    assert answer.votes == used
    return used


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
def test_the_mean_is_that_over_every_sequence_of_votes(p: float) -> None:
    mean, used = 0.0, set()
    for votes in itertools.product((False, True), repeat=SMALL.n):
        used.add(taken := votes_of(SMALL, list(votes)))
        mean += taken * p ** sum(votes) * (1 - p) ** (SMALL.n - sum(votes))
    assert expected_votes(tabulate(SMALL, 0.5), p) == pytest.approx(mean, rel=1e-12)
    assert len(used) > 4  # the procedure does stop early, at several looks


def test_the_mean_of_a_wide_distribution_is_that_of_simulated_images() -> None:
    """A cap of 10,000 reaches the fast convolution. The mean of 2,000 images is within 5 standard errors of it."""
    rng, p = np.random.default_rng(0), 0.9
    played = [votes_of(USUAL, (rng.random(USUAL.n) < p).tolist()) for _ in range(2000)]
    error = float(np.std(played)) / len(played) ** 0.5
    assert abs(expected_votes(tabulate(USUAL, 0.5), p) - float(np.mean(played))) < 5 * error


def test_each_radius_costs_a_sure_image_what_the_grid_that_ends_there_costs_it() -> None:
    costs = radius_costs(USUAL, 0.25)
    assert [c.radius for c in costs] == [0.0, *USUAL.radii] and [c.in_sigma for c in costs] == [0, 1, 2, 3, 4]
    for k, cost in enumerate(costs[:4]):
        assert votes_of(replace(USUAL, radii=USUAL.radii[:k]), [True] * USUAL.n, 0.25) == cost.fewest_votes
    assert (costs[4].fewest_votes, costs[4].typical_votes, costs[4].share) == (None, None, None)


def test_a_typical_image_lies_half_a_step_beyond() -> None:
    selected = replace(USUAL, target="selected")
    tables = tabulate(USUAL, 0.5)
    for cost, selecting, middle in zip(
        radius_costs(USUAL, 0.5), radius_costs(selected, 0.5), (0.125, 0.375, 0.625, 0.875, 1.125), strict=True
    ):
        assert cost.typical_votes == expected_votes(tables, float(special.ndtr(middle / 0.5)))
        assert cost.typical_votes is not None and cost.share == cost.typical_votes / 10_000
        assert selecting.typical_votes == cost.typical_votes + 100
        assert selecting.share == selecting.typical_votes / 10_100


def test_a_cap_too_large_for_the_distribution_has_fewest_votes_alone() -> None:
    (zero,) = radius_costs(replace(USUAL, n=2_000_000, radii=(), calibration="ville"), 0.25)
    assert zero.fewest_votes == 64 and zero.typical_votes is None
