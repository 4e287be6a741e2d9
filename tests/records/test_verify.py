"""The checks of a record alone: what they say of the chance of a false radius."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.records import verify
from bench.records.record import read_run
from bench.records.verify import check_record
from bench.smoothing.anytime import Anytime, Tables, tabulate
from bench.smoothing.procedures import describe
from tests.helpers.records import made_up

EXACT = Anytime(100, 1000, 0.001, (0.25, 0.5))


@pytest.mark.parametrize(
    ("procedure", "words"),
    [
        (EXACT, "at most 0.000996078 an image, computed exactly"),
        (replace(EXACT, calibration="ville"), "at most 0.001 an image, by Ville's inequality"),
    ],
)
def test_the_chance_of_a_false_radius_is_shown(tmp_path: Path, procedure: Anytime, words: str) -> None:
    run = made_up(tmp_path, [0.25, None, 0.5], procedure=describe(procedure))
    findings = list(check_record(run))
    assert not [f for f in findings if f.problem]
    (found,) = [f.check for f in findings if "false radius" in f.check]
    assert words in found
    assert float(found.split("at most ")[1].split()[0]) >= max(tabulate(procedure, 0.25).errors)


def test_a_chance_above_alpha_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(config: Anytime, sigma: float, tau: float) -> Tables:
        return replace(tabulate(config, sigma, tau), errors=(0.0005, 0.0011))

    run = made_up(tmp_path, [0.25], procedure=describe(EXACT))
    monkeypatch.setattr(verify, "tabulate", careless)
    (found,) = [f for f in check_record(run) if f.problem]
    assert found.problem == "that is more than alpha 0.001"


def test_a_record_of_0_2_0_is_recomputed_by_ville(tmp_path: Path) -> None:
    """It states no calibration. Some counts would certify another radius by the exact tables."""
    old = replace(EXACT, calibration="ville")
    by_ville, exactly = tabulate(old, 0.25).accept[-1], tabulate(EXACT, 0.25).accept[-1]
    assert by_ville[0] < exactly[0]
    stated = {k: v for k, v in describe(old).items() if k != "calibration"}
    run = made_up(tmp_path, [by_ville[0], None], counted=True, procedure=stated)
    assert not [f for f in check_record(run) if f.problem]
    assert read_run(run).certificates[0].predicted == 0
    assert EXACT.recompute(0.25, 1000, by_ville[0])[0] <= 0.5 < old.recompute(0.25, 1000, by_ville[0])[0]
