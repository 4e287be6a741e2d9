"""Procedures: what a record states of them, and the memory of their tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.smoothing.anytime import Anytime, tabulate
from bench.smoothing.fixed import Fixed
from bench.smoothing.procedures import Procedure, describe, procedure_of

ANYTIME = Anytime(100, 1000, 0.001, (0.25, 0.5), "label", step=16)


@pytest.mark.parametrize("procedure", [Fixed(100, 1000, 0.001), Fixed(7, 50, 0.01, "label"), ANYTIME])
def test_a_record_states_every_constant(procedure: Procedure) -> None:
    stated = json.loads(json.dumps(describe(procedure)))
    assert procedure_of({"procedure": stated}) == procedure
    assert stated["kind"] == procedure.kind


def test_an_adaptive_log_is_bounded_by_its_cap() -> None:
    stated = {"kind": "adaptive", "n0": None, "n": 1000, "alpha": 0.001}
    assert procedure_of({"procedure": stated}).largest_radius(1.0) == Fixed(1, 1000, 0.001).largest_radius(1.0)


@pytest.mark.parametrize(("procedure", "votes"), [(Fixed(100, 1000, 0.001), 1100), (replace(ANYTIME, n=64), 64)])
def test_max_votes_include_the_selection(procedure: Procedure, votes: int) -> None:
    assert procedure.max_votes == votes


def test_the_tables_of_many_noise_levels_are_not_all_kept() -> None:
    """Records are untrusted input: each may state another procedure."""
    limit = tabulate.cache_info().maxsize
    assert limit is not None
    for i in range(limit + 5):
        tabulate(replace(ANYTIME, n=64 + i, radii=()), 0.5)
    assert tabulate.cache_info().currsize == limit
