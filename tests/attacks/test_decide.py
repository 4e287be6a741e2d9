"""PREDICT against its exact error probability."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bench.attacks.decide import Predict, smallest_n


@pytest.mark.parametrize(("n", "alpha"), [(20, 0.05), (500, 0.001), (1000, 0.1)])
def test_a_wrong_class_is_decided_with_a_chance_of_at_most_alpha(n: int, alpha: float) -> None:
    """Two classes of equal chance: summed over all counts, the chance that either wrong one is decided."""
    procedure = Predict(n, alpha)
    hits = np.arange(n + 1)
    decided = np.array([procedure.update(np.array([k, n - k, 0])).predicted is not None for k in hits])
    error = float(stats.binom.pmf(hits, n, 0.5)[decided].sum())
    assert 0.3 * alpha < error <= alpha


def test_the_top_class_is_decided_below_one_half() -> None:
    found = Predict(1000, 0.001).update(np.array([400, 250, 250, 100, 0]))
    assert (found.predicted, found.top_count, found.runner_up, found.runner_up_count) == (0, 400, 1, 250)
    assert Predict(1000, 0.001).update(np.array([330, 335, 335, 0, 0])).predicted is None


def test_votes_of_nan_are_no_class() -> None:
    assert Predict(1000, 0.001).update(np.array([10, 0, 990])).predicted is None


def test_the_error_of_the_noise_makes_decisions_rarer() -> None:
    counts = np.array([560, 440, 0])
    assert Predict(1000, 0.001).update(counts).predicted == 0
    assert Predict(1000, 0.001, tau=0.02).update(counts).predicted is None


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.001, 1e-9])
def test_the_fewest_votes(alpha: float) -> None:
    least = smallest_n(alpha)
    for n, decides in ((least, True), (least - 1, False)):
        assert (Predict(n, alpha).update(np.array([n, 0, 0])).predicted == 0) == decides
