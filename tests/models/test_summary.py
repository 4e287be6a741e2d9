"""A run's first lines: its base's preprocessing, and a warning for an accuracy no better than guessing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import flop_counter

from bench import plugins
from bench.models.summary import describe, may_be_guessing
from tests.helpers.commands import TINY, Result
from tests.helpers.timmfolders import card, load, reconfigure, save

Bench = Callable[..., Result]


def test_size_resampling_mean_and_std_come_with_their_source(tmp_path: Path) -> None:
    save(tmp_path / "vit")
    assert describe(load(card(), tmp_path / "vit")).startswith(
        "base vit: 8x8 images are not resized; mean 0.5, std 0.5 (from config.json)"
    )
    save(tmp_path / "conv", "test_resnet", in_chans=3)
    said = describe(load(card(), tmp_path / "conv"))
    assert "8x8 images are resized to 160x160, bilinear (size: input_size in config.json, which is timm's" in said
    assert "which is timm's default for test_resnet: correct it there if" in said
    config = json.loads((tmp_path / "conv" / "config.json").read_text())
    reconfigure(tmp_path / "conv", pretrained_cfg=config["pretrained_cfg"] | {"input_size": [3, 8, 8]})
    assert "8x8 images are not resized" in describe(load(card(), tmp_path / "conv"))
    config["pretrained_cfg"] = {"input_size": [3, 12, 12]}
    (tmp_path / "conv" / "config.json").write_text(json.dumps(config))
    said = describe(load(card(), tmp_path / "conv"))
    assert "resized to 12x12, bilinear (size: input_size in config.json; interpolation: timm's default for" in said
    assert "(from timm's default for test_resnet)" in said


def test_a_bare_file_and_a_sidecar_name_theirs(tmp_path: Path) -> None:
    save(tmp_path / "m")
    file = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "w.safetensors")
    of_the_card = "mean 0.4 0.5 0.6, std 0.2 (from the card, since w.safetensors states none: if it had others, give -"
    assert of_the_card in describe(load(card(), file))
    (tmp_path / "m" / "config.json").rename(tmp_path / "w.json")
    assert "mean 0.5, std 0.5 (from w.json)" in describe(load(card(), file))
    config = json.loads((tmp_path / "w.json").read_text())
    (tmp_path / "w.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pretrained_cfg"}))
    assert of_the_card in describe(load(card(), file))


def test_first_lines_and_record_hold_it_and_guessing_is_warned_of(bench: Bench, tmp_path: Path) -> None:
    save(tmp_path / "base", classes=10, img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    args = ("run", "--defense", "none", "--dataset", TINY, "--examples", 1, "--out", tmp_path / "runs")
    result = bench(*args, "--base", tmp_path / "base")
    assert result.code == 0, result.err
    first, second = result.err.splitlines()[:2]
    assert first.startswith("base base: 8x8 images are not resized; mean 0.5")
    assert "clean validation images correctly, no better than guessing among 10 classes" in second
    (record,) = (tmp_path / "runs").glob("*/run.json")
    seen = json.loads(record.read_text())["base"]["preprocessing"]
    assert (seen["size"], seen["mean"], seen["normalisation_from"]) == ([8, 8], [0.5] * 3, "config.json")
    assert first in (record.parent / "log.txt").read_text()
    # A base that is trained here gives no warning.
    assert "guessing" not in bench(*args).err


def test_a_trained_bases_accuracy_is_printed_with_what_gives_a_better_one(bench: Bench, tmp_path: Path) -> None:
    text, card = Path(TINY).read_text(), tmp_path / "card.toml"
    card.write_text(text.replace("[presets.quick]", '[presets.quick]\nbase = "vit"\nbetter_base = "try harder"'))
    args = ("run", "--defense", "none", "--dataset", card, "--examples", 1, "--set", "clip=false")
    result = bench(*args, "--out", tmp_path / "runs")
    assert result.code == 0, result.err
    (record,) = (tmp_path / "runs").glob("*/run.json")
    base = json.loads(record.read_text())["base"]
    share = base["validation_clean_accuracy"]
    assert f"base vit classifies {share:.1%} of the clean validation images correctly; try harder\n" in result.err
    assert base["schedule"]["lr"] == 4e-3
    # Not for a base that the preset has not chosen, nor where the card says nothing.
    assert "try harder" not in bench(*args, "--base", "vit-0to4", "--out", tmp_path / "other").err
    assert "of the clean validation images correctly" not in bench(*args[:4], TINY, *args[5:], "--out", tmp_path).err


@pytest.mark.parametrize(
    ("right", "total", "classes", "expected"),
    [
        (0, 6, 3, True),
        (2, 6, 3, True),
        (4, 6, 3, False),
        (6, 6, 3, False),
        (1, 1, 2, False),
        (10, 100, 10, True),
        (30, 100, 10, False),
        (0, 100, 1000, True),
        (60, 100, 1000, False),
    ],
)
def test_what_guessing_reaches(right: int, total: int, classes: int, expected: bool) -> None:
    assert may_be_guessing(right, total, classes) == expected


def test_what_a_defense_notes_is_printed_once_and_recorded(bench: Bench, tmp_path: Path) -> None:
    (plugin := tmp_path / "notes.py").write_text(
        "from defenses.bitfit import BitFit\n\n\nclass Notes(BitFit):\n    def build(self) -> None:\n"
        "        super().build()\n        self.context.note('a thing to know')\n"
    )
    args = ("run", "--defense", plugin, "--dataset", TINY, "--examples", 1, "--set", "epochs=1")
    result = bench(*args, "--out", tmp_path / "runs")
    assert result.code == 0, result.err
    assert result.err.count("a thing to know") == 1
    (record,) = (tmp_path / "runs").glob("*/run.json")
    assert json.loads(record.read_text())["defense"]["notes"] == ["a thing to know"]


@pytest.mark.parametrize("name", plugins.names())
def test_a_dry_run_counts_every_defenses_operations_and_training(bench: Bench, tmp_path: Path, name: str) -> None:
    result = bench("run", "--defense", name, "--dataset", TINY, "--dry-run", "--out", tmp_path, "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)
    assert row["flops_per_vote"] > 0
    # A diffusion model is a shared part, whose training is of no one run.
    assert (row["train_seconds"] > 0) == (name not in ("none", "diffusion"))


def test_a_dry_run_continues_without_a_working_counter(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise AttributeError("no next_functions")

    monkeypatch.setattr(flop_counter.FlopCounterMode, "_count_flops", fail)
    result = bench("run", "--defense", "none", "--dataset", TINY, "--dry-run", "--out", tmp_path, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)[0]["flops_per_vote"] is None
    assert "torch cannot count the operations of a vote" in result.err


def test_the_counter_leaves_parameters_as_they_were() -> None:
    from bench.runs.costs import _frozen

    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    with _frozen(layer), torch.inference_mode():
        assert not any(p.requires_grad for p in layer.parameters())
    assert layer.weight.requires_grad and not layer.bias.requires_grad
