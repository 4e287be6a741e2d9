"""Procedures: what a record states of them, and the memory of their tables."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.smoothing.anytime import Anytime, tabulate
from bench.smoothing.fixed import Fixed
from bench.smoothing.procedures import Procedure, describe, procedure_of
from bench.smoothing.votes import Decision, Target, VoteRequest

ANYTIME = Anytime(100, 1000, 0.001, (0.25, 0.5), "label", step=16)
VILLE = replace(ANYTIME, calibration="ville", components=8)


@pytest.mark.parametrize(
    "procedure",
    [Fixed(100, 1000, 0.001), Fixed(7, 50, 0.01, "label"), ANYTIME, VILLE, replace(ANYTIME, target="correct")],
)
def test_a_record_states_every_constant(procedure: Procedure) -> None:
    stated = json.loads(json.dumps(describe(procedure)))
    assert procedure_of({"procedure": stated}) == procedure
    assert stated["kind"] == procedure.kind


def test_a_record_states_the_constants_of_its_calibration() -> None:
    both = {*("kind", "n0", "n", "alpha", "radii", "target", "calibration", "futility", "step", "growth")}
    assert set(describe(ANYTIME)) == both | {"spending"}
    assert set(describe(VILLE)) == both | {"ville_share", "components", "fastest", "slowest"}


def test_a_record_without_calibration_is_as_0_2_0_wrote_it() -> None:
    stated = {
        **{"kind": "anytime", "n0": 100, "n": 4000, "alpha": 0.001, "radii": [0.25, 0.5], "target": "selected"},
        **{"ville_share": 0.8, "components": 16, "fastest": 60, "slowest": 0.6, "futility": 0.18},
        **{"step": 32, "growth": 0.02},
    }
    procedure = procedure_of({"procedure": stated})
    assert procedure == Anytime(100, 4000, 0.001, (0.25, 0.5), calibration="ville", futility=0.18)
    assert describe(procedure) == stated | {"calibration": "ville"}


def test_an_adaptive_log_is_bounded_by_its_cap() -> None:
    stated = {"kind": "adaptive", "n0": None, "n": 1000, "alpha": 0.001}
    assert procedure_of({"procedure": stated}).largest_radius(1.0) == Fixed(1, 1000, 0.001).largest_radius(1.0)


@pytest.mark.parametrize(
    ("procedure", "votes"),
    [
        (Fixed(100, 1000, 0.001), 1100),
        (replace(ANYTIME, n=64), 64),
        (Fixed(100, 1000, 0.001, "correct"), 1100),
        (replace(ANYTIME, target="correct"), 1100),
    ],
)
def test_max_votes_include_the_selection(procedure: Procedure, votes: int) -> None:
    assert procedure.max_votes == votes


def test_the_tables_of_many_noise_levels_are_not_all_kept() -> None:
    """Records are untrusted input: each may state another procedure."""
    limit = tabulate.cache_info().maxsize
    assert limit is not None
    for i in range(limit + 5):
        tabulate(replace(ANYTIME, n=64 + i, radii=()), 0.5)
    assert tabulate.cache_info().currsize == limit


def play(procedure: Procedure, label: int, p: NDArray[np.float64], seed: int) -> tuple[Decision, list[str]]:
    """Certify an image with votes of these probabilities; return the decision and the purposes of its requests."""
    rng, run, asked = np.random.default_rng(seed), procedure.certify(0.5, label), []
    answer: VoteRequest | Decision = run.first()
    while isinstance(answer, VoteRequest):
        asked.append(answer.purpose)
        answer = run.update(np.append(rng.multinomial(answer.count, p), 0))
    return answer, asked


@pytest.mark.parametrize("kind", [Fixed(20, 400, 0.01), Anytime(20, 400, 0.01, (0.25, 0.5, 0.75))])
def test_target_correct_is_target_selected_until_a_wrong_class_is_selected(kind: Procedure) -> None:
    correct, outcomes = replace(kind, target="correct"), set()
    for seed, top in enumerate(np.linspace(0.2, 0.99, 300)):
        p = np.array([top, *[(1 - top) / 2] * 2])
        (one, asked), (other, _) = (play(made, 0, p, seed) for made in (correct, kind))
        assert other.n > 0
        if one.n:
            assert one == other and one.predicted in (0, None)
            outcomes.add(one.predicted)
        else:
            assert one == Decision(one.predicted, 0.0, 20, 0, 0, None, 0, 0.0, 20)
            assert asked == ["select"] and one.predicted in (1, 2) and other.predicted in (None, one.predicted)
            outcomes.add(one.predicted)
    assert outcomes == {0, 1, 2, None}


@pytest.mark.parametrize("kind", [Fixed(20, 400, 0.01), Anytime(20, 400, 0.01, (0.25, 0.5, 0.75))])
@pytest.mark.parametrize("target", ["selected", "label", "correct"])
def test_only_target_correct_decides_without_votes(kind: Procedure, target: Target) -> None:
    made = replace(kind, target=target)
    if target == "correct":
        assert made.recompute(0.5, 0, 0) == (0.0, 0.0)
    else:
        with pytest.raises(ValueError, match=r"look|decides"):
            made.recompute(0.5, 0, 0)
    with pytest.raises(ValueError, match=r"look|decides"):
        made.recompute(0.5, 0, 1)
