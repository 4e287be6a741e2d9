"""Loading bases: recipes, files, folders, the hub, probes and user weights; and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file
from sklearn.linear_model import LogisticRegression

from bench.data.card import Card, Recipe
from bench.data.datasets import load_card, load_split
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Schedule
from bench.io import tensors
from bench.models import probe
from bench.models.base import BaseModel, Classifier, LocalBase
from bench.models.load import load_base
from bench.models.names import blueprint, choose_base
from bench.options import RunOptions
from bench.records.grouping import method_name
from bench.records.record import read_run
from bench.report import tables
from bench.runs.estimate import Estimator
from bench.runs.plan import Plan, make_plans
from bench.runs.session import Session
from bench.text import DASH
from tests.helpers.hubserver import COMMIT, HubServer

SHARED = Path(os.environ.get("CERTBENCH_SHARED") or Path(__file__).parents[2] / ".." / "shared")
REAL = SHARED / "data" / "bases" / "vit-cifar10.safetensors"
CPU = torch.device("cpu")
ARGS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


needs_float4 = pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch before 2.8")


def quiet(done: int, total: int, loss: float) -> None:
    pass


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def digits() -> Card:
    return load_card("digits")


@pytest.fixture(scope="module")
def splits(digits: Card) -> tuple[Split, Split]:
    return load_split(digits, "train").first(200), load_split(digits, "validation").first(100)


def rgb_card(**changes: object) -> Card:
    """Return the card of a made-up data set of 3x8x8 images in three classes."""
    vit = {"model": "vit_tiny_patch16_224", "args": {**ARGS, "img_size": 8}, "schedule": {"epochs": 0.1}}
    fields: dict[str, object] = {
        "name": "rgb",
        "source": {"reader": "sklearn:digits"},
        "shape": (3, 8, 8),
        "levels": 256,
        "classes": ("a", "b", "c"),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.2, 0.2),
        "radii": (0.0,),
        "splits": {"test": 10, "validation": 10},
        "presets": {"quick": {"examples": 10, "n0": 10, "n": 100}},
        "bases": {"vit": vit},
    }
    return Card(**(fields | changes))  # type: ignore[arg-type]


def tiny(classes: int = 3, **args: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    model: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **{**ARGS, **args})
    model.args = {**ARGS, **args}  # type: ignore[assignment]
    return model.eval()


def pretrained_cfg(model: torch.nn.Module) -> dict[str, Any]:
    """timm's own description of a model, to be changed."""
    return cast(dict[str, Any], model.pretrained_cfg)


def folder(path: Path, model: torch.nn.Module) -> Path:
    """Write a folder as timm's own push_to_hf_hub does."""
    from timm.models._hub import save_for_hf

    save_for_hf(model, str(path), model_args=getattr(model, "args", None), safe_serialization=True)
    return path


def load(card: Card, name: str, splits: tuple[Split, Split] | None = None, **given: Path) -> BaseModel:
    train, validation = splits or (SimpleNamespace(names=()), None)
    return load_base(card, name, train, validation, CPU, quiet, **given)  # type: ignore[arg-type]


def refusal(card: Card, name: str) -> str:
    """Return the one-line error of a refused base."""
    with pytest.raises(BenchError) as e:
        load(card, choose_base(card, card.preset, name))
    assert "\n" not in str(e.value)
    return str(e.value)


# Local files and folders -----------------------------------------------------------------------------


def test_folder_as_timm_writes_it(tmp_path: Path) -> None:
    model = tiny()
    base = load(rgb_card(), str(folder(tmp_path / "mine", model)))
    x = torch.rand(4, 3, 8, 8)
    # Noise is added at 8x8; the classifier resizes to what the model takes, with the folder's normalisation.
    big = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = model((big - 0.5) / 0.5)
    assert torch.allclose(base.module(x), expected, atol=1e-6)
    assert base.identity()["resize"] == [16, 16]
    assert base.identity()["mean"] == [0.5, 0.5, 0.5]
    assert base.name == "mine"
    assert base.meta["source"]["sha256"] == tensors.read(tmp_path / "mine" / "model.safetensors").sha256


def test_bare_file_takes_the_fitting_recipe(tmp_path: Path) -> None:
    recipes = {
        "wide": {"model": "vit_tiny_patch16_224", "args": {**ARGS, "embed_dim": 32}, "schedule": {}},
        "fits": {"model": "vit_tiny_patch16_224", "args": ARGS, "schedule": {}},
    }
    model = tiny()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    base = load(rgb_card(bases=recipes), str(tmp_path / "w.safetensors"))
    assert isinstance(base, LocalBase) and base.architecture["args"] == ARGS
    assert base.name == "w.safetensors"
    assert base.module.get_buffer("mean").flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert torch.equal(base.module.state_dict()["model.head.weight"], model.state_dict()["head.weight"])


def test_bare_file_that_fits_nothing_names_the_key(tmp_path: Path) -> None:
    save_file(tiny(patch_size=4).state_dict(), tmp_path / "w.safetensors")
    line = refusal(rgb_card(), str(tmp_path / "w.safetensors"))
    assert "patch_embed.proj.weight has shape [16, 3, 4, 4], the model's has [16, 3, 8, 8] in recipe vit" in line


def test_recipes_of_the_same_shapes_are_ambiguous(tmp_path: Path) -> None:
    recipes = {
        str(heads): {"model": "vit_tiny_patch16_224", "args": {**ARGS, "num_heads": heads}, "schedule": {}}
        for heads in (2, 4)
    }
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    assert "fits several recipes of card rgb: 2 and 4" in refusal(
        rgb_card(bases=recipes), str(tmp_path / "w.safetensors")
    )


@pytest.mark.parametrize("where", ["metadata", "w.safetensors.json", "w.json"])
def test_architecture_in_a_sidecar_or_in_the_file(tmp_path: Path, where: str) -> None:
    model = tiny()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": ARGS, "num_classes": 3}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items()}
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata if where == "metadata" else None)
    if where != "metadata":
        (tmp_path / where).write_text(json.dumps(config))
    base = load(rgb_card(bases={}), str(tmp_path / "w.safetensors"))
    # Nothing states a normalisation: the card's.
    assert base.module.get_buffer("mean").flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert base.identity()["resize"] == [16, 16]


def test_a_classifiers_hash_does_not_depend_on_its_name(tmp_path: Path) -> None:
    card = rgb_card()
    first = load(card, str(folder(tmp_path / "a", tiny())))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load(card, str(tmp_path / "b")).sha256 == first.sha256
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    assert load(card, str(tmp_path / "b")).sha256 != first.sha256


def test_resize_is_hashed(tmp_path: Path) -> None:
    path = str(folder(tmp_path / "a", tiny()))
    assert load(rgb_card(), path).sha256 != load(rgb_card(shape=(3, 16, 16)), path).sha256


def test_a_cached_base_of_certbench_keeps_its_normalisation(tmp_path: Path) -> None:
    save_file(
        {f"model.{k}": v for k, v in tiny(img_size=8).state_dict().items()}
        | {"mean": torch.full((1, 3, 1, 1), 0.25), "std": torch.ones(1, 3, 1, 1)},
        tmp_path / "w.safetensors",
    )
    assert load(rgb_card(), str(tmp_path / "w.safetensors")).module.get_buffer("mean").flatten().tolist() == [0.25] * 3


def test_grey_images_through_a_colour_model(tmp_path: Path, digits: Card) -> None:
    base = load(digits, str(folder(tmp_path / "m", tiny(classes=10))))
    x, inner = torch.rand(2, 1, 8, 8), base.module.get_submodule("model")
    assert torch.allclose(base.module(x), inner(_up(x.expand(2, 3, 8, 8)) * 2 - 1), atol=1e-5)


def _up(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True)


def test_untrained_shares_the_architecture_and_no_weights(tmp_path: Path) -> None:
    base = load(rgb_card(), str(folder(tmp_path / "m", tiny())))
    fresh = base.untrained(5)
    assert fresh(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    assert not torch.equal(fresh.state_dict()["model.pos_embed"], base.module.state_dict()["model.pos_embed"])


# Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_refused_whatever_its_suffix(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(tiny().state_dict(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    line = refusal(rgb_card(), str(tmp_path / name))
    assert "can run hidden code" in line
    assert f"bench convert {tmp_path / name} --to w.safetensors" in line


def test_a_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", tiny())
    torch.save(tiny().state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert "no model.safetensors: pickled weights are refused" in refusal(rgb_card(), str(path))


def test_no_pickle_in_the_folder_is_opened(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", tiny())
    (path / "pytorch_model.bin").write_bytes(b"not a pickle: opening it would fail")
    load(rgb_card(), str(path))


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    whole = save(tiny().state_dict())
    file = tmp_path / "w.safetensors"
    for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:size])
        assert "corrupt or incomplete safetensors file" in refusal(rgb_card(), str(file))
    rng = np.random.default_rng(0)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 2000)] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(damaged)
        try:
            load(rgb_card(), str(file))
        except BenchError as e:
            assert "\n" not in str(e)  # noqa: PT017


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    state = tiny(img_size=8).state_dict()
    state["norm.bias"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    assert "norm.bias has values that are not finite" in refusal(rgb_card(), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "says"),
    [
        ("F8_E4M3", [4], 4, "is torch.float8_e4m3fn; save it as float32"),
        pytest.param("F4", [8], 4, "is torch.float4_e2m1fn_x2; save it as", marks=needs_float4),
        ("C64", [1], 8, "is torch.complex64; save it as"),
        ("F64", [1], 8, "not finite in float32"),
        ("F32", [0, 2**40, 2**40], 0, "fits no base recipe"),
        ("F32", [1] * 100, 4, "x has 100 dimensions"),
    ],
)
def test_tensors_that_no_base_has(tmp_path: Path, dtype: str, shape: list[int], size: int, says: str) -> None:
    head = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    data = struct.pack("<d", 1e300) if dtype == "F64" else bytes(size)
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    assert says in refusal(rgb_card(), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vti", "did you mean vit?"),
        ("timm:test_vitt", "unknown timm model 'test_vitt'; did you mean test_vit"),
        ("timm:test_vit.nope", "Invalid pretrained tag"),
        ("gone/w.safetensors", "no file gone/w.safetensors"),
        ("gone/model", "no file gone/model"),
    ],
)
def test_an_unknown_base_is_one_line(name: str, says: str) -> None:
    assert says in refusal(rgb_card(), name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": None}, "has no timm architecture"),
        ({"architecture": "nonsense"}, "nonsense"),
        ({"model_args": {**ARGS, "checkpoint_path": "/tmp/x.pt"}}, "must not set checkpoint_path"),
        ({"model_args": {**ARGS, "nonsense": 1}}, "nonsense"),
        ({"model_args": {**ARGS, "embed_dim": 32}}, "size mismatch for cls_token"),
        ({"pretrained_cfg": {"mean": 3, "std": 3}}, "config is not timm's"),
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5] * 3}}, "3 channels, but 1 values of mean"),
        ({"pretrained_cfg": {"mean": [0.5] * 3}}, "config.json states mean without std"),
        ({"pretrained_cfg": {"std": [0.5] * 3}}, "config.json states std without mean"),
        ({"num_classes": 7}, "head"),
        ({"num_classes": math.inf}, "config is not timm's"),
        ({"pretrained_cfg": [1]}, "pretrained_cfg in its config must be an object"),
        ({"model_args": 3}, "model_args in its config must be an object"),
        ({"model_args": {**ARGS, "patch_size": 0}}, "timm cannot make"),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.0] * 3}}, "logits are not finite"),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [math.inf] * 3}}, "std or logits are not finite"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = folder(tmp_path / "m", tiny()) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in refusal(rgb_card(), str(path.parent))


def test_timm_prints_no_untrusted_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "m", tiny()) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "\x1b[2J"}))
    assert "unknown timm model" in refusal(rgb_card(), str(path.parent))
    assert "\x1b" not in "".join(capfd.readouterr())


def test_a_config_cannot_send_timm_to_another_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", tiny()) / "config.json"
    config = json.loads(path.read_text())
    evil = {"file": str(tmp_path / "evil.pt"), "url": "http://127.0.0.1:9/x.pth", "custom_load": "hf"}
    config["pretrained_cfg"] |= evil | {"hf_hub_id": "a/b", "hf_hub_filename": "x.bin", "source": "hf-hub"}
    path.write_text(json.dumps(config))
    base = load(rgb_card(), str(path.parent))
    assert torch.equal(base.module.state_dict()["model.head.weight"], tiny().state_dict()["head.weight"])


def test_channels_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny(in_chans=1)
    pretrained_cfg(model).update({"mean": (0.3,), "std": (0.4,), "input_size": (1, 16, 16)})
    line = refusal(rgb_card(), str(folder(tmp_path / "m", model)))
    assert "takes 1 channels; images of rgb have 3" in line


# The hub ---------------------------------------------------------------------------------------------


def hub_files(repo: str, model: torch.nn.Module, tmp_path: Path) -> dict[tuple[str, str, str], bytes]:
    path = folder(tmp_path / "pushed", model)
    return {("model", repo, f.name): f.read_bytes() for f in path.iterdir() if f.is_file()}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a timm model, timm's own test_vit, and a repository of pickled weights."""
    files = hub_files("me/tiny", tiny(), tmp_path)
    torch.manual_seed(0)
    published = timm.create_model("test_vit", num_classes=1000)
    files["model", "timm/test_vit.r160_in1k", "model.safetensors"] = save(published.state_dict())
    pickled = io.BytesIO()
    torch.save(tiny().state_dict(), pickled)
    files["model", "me/pickled", "config.json"] = files["model", "me/tiny", "config.json"]
    files["model", "me/pickled", "pytorch_model.bin"] = pickled.getvalue()
    files["model", "me/other", "config.json"] = b'{"model_type": "swin"}'
    with HubServer(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.mark.parametrize("suffix", ["", f"@{COMMIT}"])
def test_hub_id(server: HubServer, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"hf-hub:me/tiny{suffix}"
    base = load(rgb_card(), choose_base(rgb_card(), "quick", name))
    assert torch.equal(base.module.state_dict()["model.head.weight"], tiny().state_dict()["head.weight"])
    assert base.name == name
    assert base.meta["source"] | {"sha256": ""} == {
        "kind": "hub",
        "id": "me/tiny",
        "revision": COMMIT,
        "file": "model.safetensors",
        "sha256": "",
    }
    # Once fetched it needs no network.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load(rgb_card(), name).sha256 == base.sha256


def test_timm_name_and_its_hub_id(server: HubServer, digits: Card, splits: tuple[Split, Split]) -> None:
    base = load(digits, "timm:test_vit", splits)
    assert base.meta["source"]["id"] == "timm/test_vit.r160_in1k"
    assert base.identity()["resize"] == [160, 160]
    assert base.meta["probed_from_classes"] == 1000
    assert base.module(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_hub_refusals(server: HubServer) -> None:
    assert "has no model 'me/nobody'" in refusal(rgb_card(), "hf-hub:me/nobody")
    assert "no revision 'v9'" in refusal(rgb_card(), "hf-hub:me/tiny@v9")
    assert "no model.safetensors: pickled weights are refused" in refusal(rgb_card(), "hf-hub:me/pickled")
    assert "is of transformers' swin" in refusal(rgb_card(), "hf-hub:me/other")
    assert not any("pytorch_model.bin" in request for request in server.requests)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:  # a port without a server
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}")
    for name in ("timm:test_vit", "hf-hub:me/tiny", "timm/test_vit.r160_in1k"):
        line = refusal(rgb_card(), name)
        assert "no network" in line
        assert "--base vit" in line


def test_pretrained_recipe_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipes = rgb_card().bases | {"big": Recipe("test_vit", {"epochs": 1}, pretrained=True)}
    line = refusal(rgb_card(bases=recipes), "big")
    assert "no network (HF_HUB_OFFLINE is set)" in line
    assert "--base vit" in line


def test_pretrained_recipe_is_adapted_clean_once(server: HubServer, digits: Card, splits: tuple[Split, Split]) -> None:
    from dataclasses import replace

    recipe = Recipe("test_vit", {"epochs": 0.5, "batch": 16}, {"img_size": 32}, pretrained=True)
    card = replace(digits, bases={"big": recipe})
    base = load(card, "big", splits)
    assert base.module(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    assert base.identity()["resize"] == [32, 32]  # timm resized the position embedding, too
    assert base.meta["source"]["id"] == "timm/test_vit.r160_in1k"
    assert base.meta["train_seconds"] > 0
    assert load(card, "big", splits).sha256 == base.sha256


# The probe -------------------------------------------------------------------------------------------


def test_another_number_of_classes_gets_a_linear_probe(
    tmp_path: Path, digits: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load_split(digits, "train"), load_split(digits, "validation")
    model = tiny(classes=7, img_size=8, patch_size=2, embed_dim=32, in_chans=1)
    pretrained_cfg(model).update({"mean": (0.3,), "std": (0.4,), "input_size": (1, 8, 8)})
    path = str(folder(tmp_path / "m", model))
    base = load(digits, path, splits)
    state = base.module.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(state[f"model.{key}"], value), key
    assert base.module.get_parameter("model.head.weight").shape == (10, 32)
    # Random features hold little (logistic regression gets 0.42); chance is 0.1, give or take 0.02.
    assert base.meta["probe_validation_clean_accuracy"] > 0.2
    assert base.meta["probe_seconds"] > 0
    # Once: the second time nothing is computed.
    monkeypatch.setattr(probe, "features", None)
    again = load(digits, path, splits)
    assert again.sha256 == base.sha256
    assert again.meta == base.meta


def test_a_base_without_head_is_probed(tmp_path: Path, digits: Card, splits: tuple[Split, Split]) -> None:
    base = load(digits, str(folder(tmp_path / "m", tiny(classes=0))), splits)
    assert base.module(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_bare_file_with_other_classes_still_finds_its_recipe(tmp_path: Path, digits: Card) -> None:
    args = digits.bases["vit"].args
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=4, **args).state_dict(), tmp_path / "w.safetensors")
    assert blueprint(digits, str(tmp_path / "w.safetensors")).classes == 4


# --weights -------------------------------------------------------------------------------------------


class Quiet:
    """A reporter that prints nothing."""

    def say(self, text: str) -> None:
        pass

    def training(self, what: str) -> Quiet:
        return self

    certifying = lambda self, *_: self  # noqa: E731

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


def plan(defense: str, base: Path | None, weights: Path | None, *settings: str) -> Plan:
    [only] = make_plans(
        RunOptions(
            defenses=defense,
            dataset="digits",
            sigma=".25",
            train_sigma=None,
            base=str(base) if base else None,
            weights=str(weights) if weights else None,
            preset=None,
            examples="10",
            n0=10,
            n=50,
            alpha=0.05,
            seed="0",
            settings=settings,
        )
    )
    return only


@pytest.fixture
def fast_base(tmp_path: Path, digits: Card) -> Path:
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **digits.bases["vit"].args)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def session(out: Path) -> Session:
    return Session(CPU, out, Quiet())


@pytest.mark.parametrize("defense", ["lora", "full", "retrain"])
def test_weights_of_a_defense(defense: str, fast_base: Path, tmp_path: Path) -> None:
    trained = session(tmp_path / "a").run(plan(defense, fast_base, None, "epochs=0.2"))
    [stored] = (tmp_path / "cache").glob(f"digits-{defense}-*/weights.safetensors")
    own = shutil.copy(stored, tmp_path / "own.safetensors")
    stored.parent.rename(tmp_path / "moved")  # so that only the file can be used
    given = session(tmp_path / "b").run(plan(defense, fast_base, Path(own), "epochs=0.2"))
    assert not list((tmp_path / "cache").glob(f"digits-{defense}-*"))
    known, unknown = trained.identity.as_json(), given.identity.as_json()
    # Nothing is recorded about a training that did not happen here.
    config = known["defense"]["config"]
    assert config["epochs"] == 0.2 and not any(hasattr(Schedule(), key) for key in unknown["defense"]["config"])
    known["defense"]["config"] = {k: v for k, v in config.items() if not hasattr(Schedule(), k)}
    assert (known.pop("train_sigma"), unknown.pop("train_sigma")) == (0.25, None)
    assert given.info.defense.settings == {}
    assert known["defense"].pop("objective") == "gaussian"
    assert unknown["defense"].pop("objective") is None  # unknown for a user's file
    assert unknown == known
    assert [vars(c) | {"seconds": 0} for c in given.certificates] == [
        vars(c) | {"seconds": 0} for c in trained.certificates
    ]
    assert given.cost.trainable_updated == trained.cost.trainable_updated
    # Weights trained elsewhere, with unknown cost, are not reported as trained here.
    ours, theirs = trained.cost, given.cost
    assert (ours.trained_elsewhere, theirs.trained_here) == (0, 0)
    assert ours.trained_here and theirs.trained_elsewhere == ours.trained_here
    assert ours.train_seconds and theirs.train_seconds is None
    assert (ours.queries, theirs.queries) == (0, None)
    assert given.info.defense.weights_file == "own.safetensors"
    sha256 = hashlib.sha256(Path(own).read_bytes()).hexdigest()
    assert given.info.defense.trained_elsewhere == [f"own.safetensors ({sha256[:8]})"]
    shown = tables.build([read_run(given.path)]).tables[0].cells
    assert (shown["extra data"].item(), shown["train (s)"].item()) == (f"own.safetensors ({sha256[:8]})", DASH)
    assert shown["trained here"].item() == "0" and shown["trained elsewhere"].item() == f"{theirs.trained_elsewhere:,}"
    assert method_name(given) == f"{defense} (own.safetensors {sha256[:8]})"
    assert method_name(trained) == f"{defense} epochs=0.2"


def test_weights_of_the_base(fast_base: Path, tmp_path: Path) -> None:
    via_base = session(tmp_path / "a").run(plan("none", fast_base, None))
    via_weights = session(tmp_path / "b").run(plan("none", None, fast_base))  # the card's recipe, not trained
    one, two = (r.identity.base for r in (via_base, via_weights))
    assert one and two and one.sha256 == two.sha256
    assert via_weights.info.base
    assert via_weights.info.base.as_json()["source"]["file"] == "base.safetensors"
    assert not list((tmp_path / "cache").glob("*"))
    # Both say so: neither row nor extra data may look like the recipe, which is trained here.
    sha256 = hashlib.sha256(fast_base.read_bytes()).hexdigest()
    assert method_name(via_weights) == f"none (base.safetensors {sha256[:8]})"
    assert via_weights.info.defense.trained_elsewhere == [f"base.safetensors ({sha256[:8]})"]
    assert (via_weights.cost.trained_here, via_weights.cost.train_seconds) == (0, 0)


def test_weights_with_a_search_are_refused(fast_base: Path) -> None:
    options = RunOptions(defenses="lora", dataset="digits", weights=str(fast_base), search=("lr=1e-2,1e-3",))
    with pytest.raises(BenchError, match="--weights with --search: a search trains its own weights"):
        make_plans(options)


def test_weights_refused(fast_base: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"

    def refused(defense: str, state: dict[str, torch.Tensor]) -> str:
        save_file(state, bad)
        with pytest.raises(BenchError) as e:
            session(tmp_path / "a").run(plan(defense, fast_base, bad))
        assert "\n" not in str(e.value)
        return str(e.value)

    base = load_file(fast_base)
    assert "head.bias is missing" in refused("none", {k: v for k, v in base.items() if k != "head.bias"})
    assert "head.bias has shape [4], the model's has [10]" in refused("none", base | {"head.bias": torch.zeros(4)})
    assert "extra is unknown to the model" in refused("none", base | {"extra": torch.zeros(4)})
    assert "does not fit defense lora: head.weight is unknown" in refused("lora", {"head.weight": base["head.weight"]})
    key = "model.model.head.weight"
    assert f"{key} has shape [3, 64]" in refused("full", {key: torch.zeros(3, 64)})
    torch.save(base, tmp_path / "w.pth")
    with pytest.raises(BenchError, match="can run hidden code"):
        plan("full", fast_base, tmp_path / "w.pth")
    with pytest.raises(BenchError, match="of one defense; --defense names 2"):
        plan("full,none", fast_base, bad)


def test_a_part_of_the_weights_leaves_the_rest_to_the_base(fast_base: Path, tmp_path: Path) -> None:
    head = {"model.model.head.bias": torch.ones(10)}
    save_file(head, tmp_path / "head.safetensors")
    record = session(tmp_path / "a").run(plan("full", fast_base, tmp_path / "head.safetensors"))
    assert record.cost.trainable_updated == 10
    assert record.identity.defense.weights == tensors.read(tmp_path / "head.safetensors").sha256


def test_estimate_needs_no_weights(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.runs.estimate.LONG", 0.0)  # one row is timed
    Estimator(CPU).estimate(plan("lora", Path("timm:test_vit"), None))
    assert not server.requests


# A real base -----------------------------------------------------------------------------------------

real = pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL}; set CERTBENCH_SHARED")


@real
def test_real_base_finds_its_recipe() -> None:
    base = load(load_card("cifar10"), str(REAL))
    assert isinstance(base, LocalBase) and base.parameters == sum(v.numel() for v in load_file(REAL).values())
    assert base.identity()["resize"] is None


@real
def test_probe_of_real_features_is_near_logistic_regression(tmp_path: Path, digits: Card) -> None:
    """A ViT trained on CIFAR-10 gets a probe for digits: its features separate them, its own head does not fit."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **load_card("cifar10").bases["vit-patch4"].args)
    model.load_state_dict(load_file(REAL))
    model.reset_classifier(7)  # type: ignore[operator]
    splits = load_split(digits, "train").first(500), load_split(digits, "validation")
    base = load(digits, str(folder(tmp_path / "m", model.eval())), splits)
    assert isinstance(base.module, Classifier)
    values = [probe.features(base.module, base.module.head(), s, CPU, quiet) for s in splits]
    center, scale = values[0].standardise()
    best = LogisticRegression(max_iter=2000).fit(values[0].values, values[0].labels)
    possible = best.score((values[1].values - center) / scale, values[1].labels)
    assert possible > 0.9
    assert base.meta["probe_validation_clean_accuracy"] > possible - 0.05


@real
@pytest.mark.slow
def test_real_base_has_its_stated_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTBENCH_DATA", str(SHARED / "data"))
    card = load_card("cifar10")
    split = load_split(card, "test")
    right, total = load(card, str(REAL)).accuracy(split, list(range(0, len(split), 4)))
    assert abs(right / total - 0.69) < 0.03  # published for all 9,000 images; a quarter of them gives +-2%
