"""Test that options without effect are refused or reported, and that noise in other units gets a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
FEW = ("--dataset", TINY, "--examples", 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--defense", "none", "--objective", "consistency"), "--objective consistency has no effect: none trains"),
        (("--defense", "none", "--train-sigma", ".5"), "--train-sigma 0.5 has no effect: none trains nothing"),
        (("--defense", "none", "--set", "clip=true,false", "--train-sigma", ".25"), "--train-sigma 0.25 has no effect"),
        (("--defense", "diffusion", "--set", "unet=somewhere", "--objective", "dign"), "--objective dign"),
        (("--defense", "lora", "--weights", "w.safetensors", "--objective", "dign"), "--weights, which are trained"),
    ],
)
def test_an_option_that_no_defense_of_the_command_uses_is_refused(
    bench: Bench, tmp_path: Path, args: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    result = bench("run", *args, *FEW)
    assert result.code == 2 and result.err.count("\n") == 1
    assert words in result.err
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]


def test_an_option_that_one_defense_uses_is_reported_unused_for_the_others(bench: Bench, tmp_path: Path) -> None:
    names = f"none,head,{defense('half_space')}"  # the last one trains nothing, but does not declare it
    args = ("--objective", "stability", "--train-sigma", ".5", "--set", "epochs=0.1", "--out", tmp_path)
    ran = bench("run", "--defense", names, *FEW, *args, "--json")
    assert ran.code == 0, ran.err
    runs = {r["identity"]["defense"]["name"]: r["identity"] for r in json.loads(ran.out)}
    assert runs["head"]["train_sigma"] == 0.5 and runs["head"]["defense"]["objective"] == "stability"
    for name in ("none", "half-space"):
        assert runs[name]["train_sigma"] == runs[name]["sigma"] == 0.25
        assert runs[name]["defense"]["objective"] is None
    said = [line for line in ran.err.splitlines() if "has no effect" in line]
    assert [("none" in line, "half_space" in line) for line in said] == [(True, False)] * 2 + [(False, True)] * 2
    # The command without these options makes the same run.
    again = bench("run", "--defense", "none", *FEW, "--out", tmp_path)
    assert "already complete" in again.err


def test_training_options_with_the_users_weights_are_only_recorded(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "head", *FEW, "--out", tmp_path / "runs")
    save_file({"model.head.weight": np.zeros(1)}, tmp_path / "w.safetensors")
    given = ("--weights", tmp_path / "w.safetensors", "--train-sigma", ".5", "--set", "epochs=3.5")
    said = bench(*args, *given)
    assert said.code == 2  # its shape differs
    assert "bench: --train-sigma 0.5 is only recorded: --weights are trained already" in said.err
    assert "bench: --set epochs=3.5 has no effect: --weights are trained already" in said.err


def test_n0_without_selection_is_reported_to_have_no_effect(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "none", *FEW, "--out", tmp_path, "--target", "label", "--dry-run")
    assert "--n0 30 has no effect" in bench(*args, "--n0", 30).err
    assert "no effect" not in bench(*args).err


@pytest.mark.parametrize("option", ["--sigma", "--train-sigma"])
def test_noise_in_other_units_gets_a_hint(bench: Bench, tmp_path: Path, option: str) -> None:
    result = bench("run", "--defense", "head", *FEW, option, 25, "--dry-run")
    assert result.err.count(f"{option} 25: pixels are in [0, 1], so 25 of 255 levels are {option} 0.09804") == 1
    assert result.err.count("pixels are in [0, 1]") == 1
    assert "pixels are" not in bench("run", "--defense", "head", *FEW, option, 1, "--dry-run").err


def test_noise_of_a_log_in_other_units_gets_a_hint(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.1\t1\t0.5\n")
    args = ("import", tmp_path / "log.tsv", "--dataset", "mine", "--alpha", ".001", "--n", 1000, "--out", tmp_path)
    assert "pixels are in [0, 1]" in bench(*args, "--sigma", 25).err
