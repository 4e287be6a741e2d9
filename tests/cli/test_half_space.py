"""A classifier whose certified radius is known, through the command line: counts against their distribution and keys.

All pictures of a class are the same grey, in the test part and in the validation part. A picture of grey g has its
mean pixel 8 |g/255 - threshold| from the half-space in l2, its true radius r, so each of its votes is right with
probability Phi(r / sigma). F and rounding to the grid commute up to 1e-5 in that probability (see below).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bench.smoothing import bounds, thresholds
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.procedures import procedure_of
from tests.helpers.commands import Result, defense
from tests.helpers.greys import DISTANCES, EDGE, GREYS, SIZE, THRESHOLD, chances, make_card

Bench = Callable[..., Result]
PICTURES = 16  # of each class
SIGMA, TRAIN_SIGMA, N, N0 = 0.25, 0.6, 1000, 50
RIGHT = chances(SIGMA)
SEEDS, SPLITS = (0, 1), ("test", "validation")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A card of grey pictures; its test and validation parts hold the same ones."""
    return make_card(tmp_path_factory.mktemp("greys"), [0.0, 0.1, 0.2, 0.3], PICTURES)


Runs = dict[tuple[Any, ...], tuple[dict[str, Any], list[dict[str, Any]]]]


def certified(card: str, out: Path, *more: object) -> Runs:
    """The identity and the lines of each run of the half-space, by seed."""
    from bench.cli import main

    known = ("--defense", defense("half_space"), "--set", f"threshold={THRESHOLD!r}")
    args = ("run", "--dataset", card, *(() if "--defense" in more else known))
    sizes = ("--sigma", SIGMA, "--train-sigma", TRAIN_SIGMA, "--n", N, "--n0", N0, "--examples", 2 * PICTURES)
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in (*args, *sizes, "--out", out, *more)])
    assert not stop.value.code
    found: Runs = {}
    for path in out.glob("*/run.json"):
        identity = json.loads(path.read_text())["identity"]
        lines = map(json.loads, path.with_name("certificates.jsonl").read_text().splitlines())
        rows = sorted(({**line, "seconds": 0.0} for line in lines), key=lambda line: int(line["index"]))
        assert [row["index"] for row in rows] == list(range(2 * PICTURES))
        found[identity["seed"],] = identity, rows
    return found


@pytest.fixture(scope="module")
def runs(card: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By noise, split and seed."""
    seeds = ("--seed", ",".join(map(str, SEEDS)))
    return {
        (noise, split, *key): run
        for noise, split in (("grid", "test"), ("grid", "validation"), ("float", "test"))
        for key, run in certified(
            card, tmp_path_factory.mktemp(noise), "--noise", noise, "--split", split, *seeds
        ).items()
    }


def for_class_1(row: dict[str, Any]) -> int:
    """The votes of a line that are for class 1, whichever class was selected."""
    top = int(row["runner_up"] == 0 if row["runner_up"] is not None else row["predicted"])
    return int(row["top_count"] if top else row["n"] - row["top_count"])


def redrawn(noise: GridNoise, row: dict[str, Any], purpose: str, count: int, edge: float) -> int:
    """How many of an image's first votes of a purpose are for class 1."""
    drawn = noise.draw([Vote(purpose, row["index"], i) for i in range(count)], SIZE)
    return int((drawn.to(torch.int64).sum(1) + SIZE * GREYS[row["label"]] > edge).sum())


def test_rounding_to_the_grid_changes_the_chance_of_a_vote_by_less_than_1e_5() -> None:
    """The exact distribution of the sum of 64 rounded Gaussians, by convolution."""
    step = 255 * SIGMA
    reach = round(9 * step)
    sums = np.diff(stats.norm.cdf((np.arange(-reach, reach + 2) - 0.5) / step))
    for _ in range(6):  # of 2, 4, ... 64 pixels
        sums, reach = np.convolve(sums, sums), 2 * reach
    chances = [sums[np.arange(-reach, reach + 1) + SIZE * g > EDGE].sum() for g in GREYS]
    assert [1 - chances[0], chances[1]] == pytest.approx(RIGHT, abs=1e-5)


@pytest.mark.parametrize("noise", ["grid", "float"])
def test_pooled_counts_agree_with_the_closed_form(runs: Runs, noise: str) -> None:
    """A binomial test of every class; false-alarm rate 1e-6 each, for random seeds.

    The rounding's 1e-5 is a hundredth of the standard error of the 64,000 votes of a class.
    """
    pooled = [rows for key, (_, rows) in runs.items() if key[0] == noise]
    assert len(pooled) == (4 if noise == "grid" else 2)
    for label in (0, 1):
        ones = [for_class_1(row) for rows in pooled for row in rows if row["label"] == label]
        assert len(ones) == PICTURES * len(pooled)
        right = sum(ones) if label else N * len(ones) - sum(ones)
        assert stats.binomtest(right, N * len(ones), RIGHT[label]).pvalue > 1e-6
        assert stats.binomtest(right, N * len(ones), RIGHT[label] + 0.02).pvalue < 1e-6  # so much is seen


def test_no_certificate_exceeds_the_true_radius(runs: Runs) -> None:
    """Each exceeds it with a chance of at most .001: more than 4 of 192 have one of 2e-6."""
    assert stats.binom.sf(4, 192, 0.001) < 2e-6
    false = 0
    for identity, rows in runs.values():
        # Nothing is trained, so the record does not name the noise level of training that was asked for.
        assert (identity["sigma"], identity["train_sigma"]) == (SIGMA, SIGMA)
        true = DISTANCES
        false += sum(row["radius"] > true[row["label"]] for row in rows)
        # 1,000 votes of p = .94 certify radii that are short of the truth, and not by much.
        assert np.mean([true[row["label"]] - row["radius"] for row in rows]) < 0.08
    assert false <= 4


def test_every_count_is_that_of_its_keys(card: str, runs: Runs, tmp_path: Path) -> None:
    """A plain loop over (seed, split, purpose, image, vote) gives every recorded count of grid noise.

    Where p is about 1/2, which class is selected depends on the selection's own noise.
    """
    near = SIZE * GREYS[1] + 0.5
    ((_, even),) = certified(card, tmp_path, "--set", f"threshold={near / SIZE / 255!r}").values()
    cases = [(key[1], key[2], EDGE, rows) for key, (_, rows) in runs.items() if key[0] == "grid"]
    for split, seed, edge, rows in [*cases, ("test", 0, near, even)]:
        noise = GridNoise(Noise(seed, split), SIGMA, 256)
        for row in rows:
            votes = redrawn(noise, row, "estimate", N, edge)
            selected = 2 * redrawn(noise, row, "select", N0, edge) > N0
            assert for_class_1(row) == votes
            assert row["top_count"] == (votes if selected else N - votes)


def test_seeds_and_splits_share_no_noise(runs: Runs, card: str, tmp_path: Path) -> None:
    """The same pictures have other counts with another seed, split or kind of noise, and the same with the same."""
    counts = {key: tuple(for_class_1(row) for row in rows) for key, (_, rows) in runs.items()}
    assert len(set(counts.values())) == len(counts) == 6
    again = certified(card, tmp_path, "--split", "validation", "--seed", 1)
    assert again[1,] == runs["grid", "validation", 1]


def test_a_defense_gets_the_sigma_it_is_certified_at(card: str, tmp_path: Path) -> None:
    ((_, rows),) = certified(card, tmp_path, "--defense", defense("sure_at_sigma"), "--set", f"sigma={SIGMA}").values()
    assert {for_class_1(row) for row in rows} == {N}


@pytest.mark.parametrize("kind", ["fixed", "anytime"])
def test_the_noise_error_of_the_identity_is_charged(
    card: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an error of .05, larger than any real one, every radius follows from the counts and that error."""
    tau = 0.05
    monkeypatch.setattr(thresholds, "tau", lambda sigma, levels, size: tau)
    ((identity, rows),) = certified(card, tmp_path, "--procedure", kind, "--target", "label").values()
    assert identity["noise"]["tau"] == tau
    procedure, certifies = procedure_of(identity), 0
    for row in rows:
        assert (row["p_lower"], row["radius"]) == procedure.recompute(SIGMA, row["n"], row["top_count"], tau)
        bound = bounds.lower_bound(row["top_count"], row["n"], procedure.alpha) - tau
        assert row["radius"] <= bounds.radius(bound, SIGMA)
        certifies += row["radius"] > 0
    assert certifies > PICTURES
