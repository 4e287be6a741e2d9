"""Mean and std of weights that state none: the user's, else the card's, and the run says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.data.card import Recipe
from bench.errors import BenchError
from bench.models.load import untrained_base
from bench.models.names import Given
from bench.models.summary import describe
from bench.options import RunOptions
from bench.runs.plan import make_plans
from tests.helpers.commands import TINY, Result
from tests.helpers.timmfolders import CPU, VIT, card, load, save

Bench = Callable[..., Result]
OWN = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
GIVEN = Given(normalisation=OWN)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a file of weights without config, saved from a timm folder beside it."""
    save(tmp_path / "m")
    file = tmp_path / "w.safetensors"
    save_file(load_file(tmp_path / "m" / "model.safetensors"), file)
    return file


def test_the_users_mean_and_std_are_used_stated_and_part_of_the_identity(bare: Path) -> None:
    base, of_card = load(card(), bare, given=GIVEN), load(card(), bare)
    x = torch.rand(3, 3, 8, 8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in OWN)
    assert torch.allclose(base.module(x), base.module.get_submodule("model")((x - mean) / std), atol=1e-6)
    assert "mean 0.1 0.2 0.3, std 0.4 0.5 0.6 (from --mean and --std)" in describe(base)
    assert base.identity()["mean"] == pytest.approx(OWN[0]) and base.identity()["std"] == pytest.approx(OWN[1])
    assert base.sha256 != of_card.sha256
    assert of_card.identity()["mean"] == pytest.approx([0.4, 0.5, 0.6])
    assert "(from the card, since w.safetensors states none: if it had others, give --mean and --std)" in describe(
        of_card
    )


def test_a_sidecar_without_mean_takes_them_too(bare: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, "num_classes": 3}
    (bare.parent / "w.json").write_text(json.dumps(config))
    assert load(card(), bare, given=GIVEN).identity()["mean"] == pytest.approx(OWN[0])
    assert "(from the card, since w.safetensors states none" in describe(load(card(), bare))
    with pytest.raises(BenchError, match="3 channels, but 1 values of mean"):
        load(card(), bare, given=Given(normalisation=((0.5,), (0.5,))))


@pytest.mark.parametrize("stated", ["mean", "std"])
def test_half_a_normalisation_is_refused(bare: Path, stated: str) -> None:
    """It used to be dropped for the card's in silence."""
    config = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, "pretrained_cfg": {stated: [0.5] * 3}}
    (bare.parent / "w.json").write_text(json.dumps(config))
    with pytest.raises(BenchError, match=rf"w\.json states {stated} without"):
        load(card(), bare)


def test_a_bare_file_of_a_published_architecture_names_the_card(tmp_path: Path) -> None:
    """Its values are the card's, and not those of the weights that timm publishes for it."""
    save(tmp_path / "m", "test_vit", in_chans=3)
    file = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "w.safetensors")
    made = replace(card(), bases={"big": Recipe("test_vit", {}, pretrained=True)})
    base = load(made, file)
    assert "mean 0.4 0.5 0.6, std 0.2 (from the card, since w.safetensors states none" in describe(base)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("m", "--mean and --std have no effect: base m has those of config.json"),
        ("m/model.safetensors", "has those of config.json"),
        ("vit", "base vit has those of the card"),
    ],
)
def test_a_base_that_states_its_own_refuses_others(bare: Path, name: str, says: str) -> None:
    path: Any = name if name == "vit" else bare.parent / name
    with pytest.raises(BenchError, match=says):
        load(card(), path, given=GIVEN)
    with pytest.raises(BenchError, match=says):  # an estimate too
        untrained_base(card(), str(path), CPU, given=GIVEN)


def test_tensors_of_mean_and_std_in_the_file_refuse_others(bare: Path) -> None:
    state = {f"model.{k}": v for k, v in load_file(bare).items()}
    save_file(state | {"mean": torch.full((1, 3, 1, 1), 0.25), "std": torch.ones(1, 3, 1, 1)}, bare)
    assert "mean 0.25, std 1 (from w.safetensors)" in describe(load(card(), bare))
    with pytest.raises(BenchError, match=r"--mean and --std have no effect: w\.safetensors has its own"):
        load(card(), bare, given=GIVEN)


def test_a_number_for_each_channel(bare: Path) -> None:
    with pytest.raises(BenchError, match=r"--mean and --std: 1 values; base w\.safetensors takes 3 channels"):
        load(card(), bare, given=Given(normalisation=((0.5,), (0.5,))))


def test_weights_with_a_config_of_another_model_are_refused(bare: Path) -> None:
    """A sidecar of ``--weights`` used to be ignored; the number of heads shows in no shape."""
    given = Given(weights=bare)
    plain = load(card(), "vit", given=given)  # type: ignore[arg-type]
    config = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, "num_classes": 3}
    (bare.parent / "w.json").write_text(json.dumps(config))
    assert load(card(), "vit", given=given).sha256 == plain.sha256  # type: ignore[arg-type]
    (bare.parent / "w.json").write_text(json.dumps(config | {"model_args": VIT | {"num_heads": 4}}))
    with pytest.raises(BenchError, match=r"its w\.json describes another model of vit_tiny_patch16_224"):
        load(card(), "vit", given=given)  # type: ignore[arg-type]
    stated = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (bare.parent / "w.json").write_text(json.dumps(config | stated))
    with pytest.raises(BenchError, match=r"its w\.json says mean \(0\.5, 0\.5, 0\.5\), and base vit has \(0\.4"):
        load(card(), "vit", given=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mean": ".5"}, "--mean and --std belong together"),
        ({"std": ".5", "base": "w.safetensors"}, "--mean and --std belong together"),
        ({"mean": ".5", "std": ".5"}, "are those of a file of weights; give --base FILE"),
        ({"mean": ".5", "std": ".5", "base": "http://localhost/v2/models/m"}, "give --base FILE"),
        ({"mean": ".5,.5", "std": ".5", "base": "w"}, "must be a number for each channel"),
        ({"mean": ".5", "std": "0", "base": "w"}, "and std above 0"),
        ({"mean": "inf", "std": ".5", "base": "w"}, "must be a number for each channel"),
        ({"mean": "grey", "std": ".5", "base": "w"}, "--mean grey: must be a number"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(given: dict[str, Any], says: str) -> None:
    with pytest.raises(BenchError, match=says):
        make_plans(RunOptions(defenses="none", dataset="digits", **given))


def test_a_run_states_and_records_them(bench: Bench, tmp_path: Path) -> None:
    save(tmp_path / "m", classes=10)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "w.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, "num_classes": 10}
    (tmp_path / "w.json").write_text(json.dumps(config))
    args = ("run", "--defense", "none", "--dataset", TINY, "--examples", 1, "--base", tmp_path / "w.safetensors")
    given = ("--mean", ".5,.5,.25", "--std", ".2,.3,.2")  # equal values count once for each channel
    result = bench(*args, *given, "--out", tmp_path / "runs")
    assert result.code == 0, result.err
    assert "mean 0.5 0.5 0.25, std 0.2 0.3 0.2 (from --mean and --std)" in result.err.splitlines()[0]
    (file,) = (tmp_path / "runs").glob("*/run.json")
    record = json.loads(file.read_text())
    assert (record["arguments"]["mean"], record["arguments"]["std"]) == (".5,.5,.25", ".2,.3,.2")
    assert record["identity"]["base"]["mean"] == pytest.approx([0.5, 0.5, 0.25])
    assert record["base"]["preprocessing"]["normalisation_from"] == "--mean and --std"
    verified = bench("verify", file.parent)
    assert verified.code == 0 and "not drawn again" not in verified.out
