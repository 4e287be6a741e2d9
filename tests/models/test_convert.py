"""Pickled checkpoints converted by ``bench convert``: read weights-only, renamed, described, or refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.errors import BenchError
from bench.io import limits
from bench.models.convert import Stated, convert
from tests.helpers import released, timmfolders
from tests.helpers.commands import Bench

CIFAR10 = [[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]]
IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]


def refusal(file: Path, out: Path, **stated: Any) -> str:
    with pytest.raises(BenchError) as e:
        convert(file, out, Stated(**stated))
    assert "\n" not in str(e.value)
    assert not out.exists()
    return str(e.value)


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


# Released classifiers --------------------------------------------------------------------------------


def test_cohens_resnet110_is_converted(bench: Bench, tmp_path: Path) -> None:
    net, out = released.resnet110(), tmp_path / "cohen.safetensors"
    assert sum(p.numel() for p in net.parameters()) == 1_730_714  # with 1x1 convolutions in two shortcuts
    file = released.save(tmp_path / "checkpoint.pth.tar", released.Normalised(net, False), arch="cifar_resnet110")
    ran = bench("convert", file, "--to", out)
    assert ran.code == 0, ran.err
    for line in (
        "recognised: resnet110, 10 classes, 1,730,714 parameters",
        "renamed: the prefix '1.' is removed from all",
        "mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201: of the released normalisation layer for CIFAR-10",
        "dropped: epoch (90), optimizer, arch ('cifar_resnet110')",
        f"use: bench run --base {out}",
    ):
        assert line in ran.out
    stored, wanted = load_file(out), net.state_dict()
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(v, wanted[k]) for k, v in stored.items())
    config = json.loads(Path(f"{out}.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet110", 10)
    described = config["pretrained_cfg"]
    assert [described["mean"], described["std"]] == CIFAR10
    assert described["input_size"] == [3, 32, 32]


def equal_logits(tmp_path: Path, net: released.ResNet, shape: tuple[int, int, int], values: list[list[float]]) -> None:
    """Convert a released network; compare the base made of it with the network itself, normalised by hand."""
    wrapped = shape[1] == 224
    file, out = released.save(tmp_path / "c.pth.tar", released.Normalised(net, wrapped)), tmp_path / "c.safetensors"
    convert(file, out, Stated())
    classes = tuple(map(str, range(net.fc.out_features)))
    base = timmfolders.load(timmfolders.card(classes, shape=shape, bases={}), out)
    x = torch.rand(2, *shape)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in values)
    with torch.no_grad():
        torch.testing.assert_close(base.module(x), net((x - mean) / std), rtol=1e-4, atol=1e-4)
    assert base.meta["preprocessing"]["normalisation_from"] == "c.safetensors.json"


def test_a_converted_resnet110_gives_equal_logits(tmp_path: Path) -> None:
    equal_logits(tmp_path, released.resnet110(), (3, 32, 32), CIFAR10)


def test_a_converted_resnet50_gives_equal_logits(tmp_path: Path) -> None:
    equal_logits(tmp_path, released.resnet50(), (3, 224, 224), IMAGENET)


def test_counters_of_batch_norms_may_be_missing(tmp_path: Path) -> None:
    state = {f"1.{k}": v for k, v in released.resnet110().state_dict().items() if "tracked" not in k}
    convert(save(tmp_path / "old.pth", {"state_dict": state}), tmp_path / "o.safetensors", Stated())
    assert load_file(tmp_path / "o.safetensors").keys() == {k.removeprefix("1.") for k in state}


# Other classifiers -----------------------------------------------------------------------------------


def test_any_timm_model_is_converted_if_it_is_named(bench: Bench, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", num_classes=3).eval()
    out = tmp_path / "t.safetensors"
    save(tmp_path / "t.pt", {f"module.{k}": v for k, v in net.state_dict().items()})
    words = ("--as", "test_vit", "--mean", ".1,.2,.3", "--std", ".4,.5,.6")
    ran = bench("convert", tmp_path / "t.pt", "--to", out, *words)
    assert ran.code == 0, ran.err
    assert "removed from all" in ran.out and "mean 0.1 0.2 0.3, std 0.4 0.5 0.6: as given" in ran.out
    assert "input size 160x160: timm's default" in ran.out
    base = timmfolders.load(timmfolders.card(shape=(3, 160, 160), bases={}), out)
    x = torch.rand(2, 3, 160, 160)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(base.module(x), net((x - mean) / std))


def test_plain_tensors_keep_their_names(tmp_path: Path) -> None:
    state = {"module.a": torch.rand(2, 3), "module.b": torch.arange(3)}
    convert(save(tmp_path / "t.pt", {"net": state}), tmp_path / "t.safetensors", Stated("tensors"))
    stored = load_file(tmp_path / "t.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in stored.items())
    assert not (tmp_path / "t.safetensors.json").exists()


def test_tensors_that_share_memory_are_copied(tmp_path: Path) -> None:
    one = torch.rand(4)
    convert(save(tmp_path / "t.pt", {"a": one, "b": one[:2]}), tmp_path / "t.safetensors", Stated("tensors"))
    assert torch.equal(load_file(tmp_path / "t.safetensors")["b"], one[:2])


# Refusals --------------------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, legacy: bool) -> None:
    value = {"state_dict": {"1.fc.weight": torch.rand(2, 2)}, "args": Evil(tmp_path / "ran")}
    torch.save(value, tmp_path / "e.pt", _use_new_zipfile_serialization=not legacy)
    line = refusal(tmp_path / "e.pt", tmp_path / "e.safetensors")
    assert not (tmp_path / "ran").exists()
    assert "mkdir" in line and "refused" in line


NETWORK = {"a.weight": torch.rand(2, 2), "a.bias": torch.rand(2)}


@pytest.mark.parametrize(
    ("value", "stated", "words"),
    [
        (NETWORK, {}, "2 tensors (a.weight [2, 2], a.bias [2], ...); give --as with the name of a timm model"),
        ({"state_dict": NETWORK, "arch": "mine"}, {}, "beside them arch ('mine')"),
        ({"model": NETWORK, "ema": NETWORK}, {}, "several sets of weights (model, ema)"),
        ({"epoch": 3}, {}, "no set of weights among its entries epoch (3)"),
        ([1, 2], {}, "holds a list"),
        ({"a": torch.rand(2).to_sparse()}, {}, "no set of weights"),
        (NETWORK, {"kind": "resnet5"}, "did you mean"),
        (NETWORK, {"kind": "resnet18"}, "no tensor fc.weight, the head; it has a.weight, a.bias"),
        (NETWORK, {"kind": "tensors", "mean": (1.0,)}, "--mean and --std have no effect"),
        (NETWORK, {"kind": "resnet18", "flags": "--image_size 3"}, "--flags describe a diffusion model"),
    ],
)
def test_what_is_not_recognised_is_named(tmp_path: Path, value: Any, stated: dict[str, Any], words: str) -> None:
    assert words in refusal(save(tmp_path / "x.pt", value), tmp_path / "x.safetensors", **stated)


def resnet110_state(change: dict[str, Tensor | None]) -> dict[str, Tensor]:
    state = {**released.resnet110().state_dict(), **change}
    return {f"1.{k}": v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra.weight": torch.rand(2)}, "extra.weight is unknown to the model"),
        ({"layer2.0.downsample.0.weight": None}, "layer2.0.downsample.0.weight is missing"),
        ({"layer1.3.bn1.weight": torch.rand(7)}, "layer1.3.bn1.weight has shape [7], the model's has [16]"),
        ({"fc.weight": torch.rand(100, 64), "fc.bias": torch.rand(100)}, "with 100 classes: mean and std are not in"),
    ],
)
def test_a_network_that_is_nearly_a_released_one_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    assert words in refusal(save(tmp_path / "x.pt", resnet110_state(change)), tmp_path / "x.safetensors")


def test_mean_and_std_are_never_guessed(tmp_path: Path) -> None:
    file = save(tmp_path / "bare.pt", released.resnet110().state_dict())  # no layer before it
    assert "give --mean and --std" in refusal(file, tmp_path / "x.safetensors")
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2)}
    assert "three values each" in refusal(file, tmp_path / "x.safetensors", **given)
    convert(file, tmp_path / "x.safetensors", Stated("", *map(tuple, CIFAR10)))  # type: ignore[arg-type]


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.safetensors"
    whole = save(tmp_path / "w.pt", NETWORK).read_bytes()
    for size in (0, 1, 30, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        assert "cut.pt" in refusal(tmp_path / "cut.pt", out)
    assert "cannot be read" in refusal(tmp_path / "none.pt", out)
    assert "not a regular file" in refusal(tmp_path, out)
    assert "already safetensors" in refusal(timmfolder(tmp_path), out)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    monkeypatch.setattr(limits, "memory", lambda: 10**6)
    assert "do not fit into" in refusal(tmp_path / "bomb.pt", out)
    save(tmp_path / "view.pt", {"a": torch.zeros(1).expand(10**6)})  # 4 MB from 4 bytes
    assert "do not fit into" in refusal(tmp_path / "view.pt", out)


def timmfolder(tmp_path: Path) -> Path:
    timmfolders.save(tmp_path / "timm")
    return tmp_path / "timm" / "model.safetensors"


def test_nothing_is_overwritten(bench: Bench, tmp_path: Path) -> None:
    file, out = save(tmp_path / "t.pt", NETWORK), tmp_path / "t.safetensors"
    for _ in range(2):
        ran = bench("convert", file, "--to", out, "--as", "tensors")
    assert ran.code == 2 and f"{out} exists; choose another --to" in ran.err
    ran = bench("convert", file, "--to", tmp_path / "folder", "--as", "tensors")
    assert ran.code == 2 and "a file NAME.safetensors" in ran.err


def test_a_base_and_weights_name_the_command(bench: Bench, tmp_path: Path) -> None:
    file = released.save(tmp_path / "checkpoint.pth.tar", torch.nn.Linear(2, 2))
    for option in ("--base", "--weights"):
        ran = bench("run", "--defense", "none", "--dataset", "digits", option, file)
        assert ran.code == 2
        assert f"bench convert {file} --to checkpoint.safetensors" in ran.err
