"""PEFT folders: adapters that the peft library saved are loaded as they are, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import globalstate
from bench.data.datasets import load_card, load_split
from bench.errors import BenchError
from bench.interface import Access
from bench.models import peft_folders
from bench.models.base import Classifier, LocalBase
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.plan import make_plans
from defenses.lora import LoRA
from tests.defenses.test_peft import CPU, DRAW, build, classifier, images, resnet, vit
from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]
QKV: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["qkv"]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def randomise(model: nn.Module) -> None:
    """Move everything trained away from its start, where adapters have no effect."""
    with torch.no_grad(), globalstate.fixed_rng(2):
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def timm_model(base: LocalBase) -> Any:
    return base.view(Access.WEIGHTS).copy().model


def save(base: LocalBase, folder: Path, **config: Any) -> Path:
    """Write the folder of a random adapter of the base, by peft itself."""
    adapted = peft.get_peft_model(timm_model(base), peft.LoraConfig(**config))
    randomise(adapted)
    adapted.save_pretrained(str(folder))
    return folder


def load(base: LocalBase, folder: Path, *settings: str) -> fitting.Fitted:
    (plan,) = make_plans(RunOptions(defenses="lora", dataset=TINY, weights=str(folder), settings=settings))
    train = load_split(load_card(TINY), "train").first(16)
    return fitting.fit(plan, base, train, CPU, lambda *_: None)


def by_peft(base: LocalBase, folder: Path, x: Tensor) -> Tensor:
    """Compute the logits of pixels by peft's model of the folder, on the base's timm model."""
    model = peft.PeftModel.from_pretrained(timm_model(base), str(folder)).eval()
    if base.module.size is not None:
        x = nn.functional.interpolate(x, base.module.size, mode="bilinear", align_corners=False)  # type: ignore[arg-type]
    out: Tensor = model((x - base.module.mean) / base.module.std)  # type: ignore[operator]
    return out


ON_A_VIT: list[dict[str, Any]] = [
    QKV,
    {"r": 3, "lora_alpha": 6, "target_modules": ["qkv", "fc1"], "use_rslora": True},
    {"r": 2, "lora_alpha": 5, "target_modules": ["qkv", "proj", "fc1", "fc2"], "use_dora": True},
    {"r": 2, "lora_alpha": 5, "target_modules": r"blocks\.1\..*fc\d", "lora_dropout": 0.1},
    {"r": 2, "lora_alpha": 5, "target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {**QKV, "modules_to_save": ["head"]},
]


@pytest.mark.parametrize("config", ON_A_VIT)
def test_a_folder_of_peft_gives_the_logits_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    base, x = vit(), images()
    fitted = load(base, save(base, tmp_path, **config))
    with torch.no_grad():
        wanted = by_peft(base, tmp_path, x)
        assert (wanted - base.module(x)).abs().max() > 1e-2
        assert (fitted.defense.logits(x, DRAW) - wanted).abs().max() < 1e-5
    settings = fitted.defense.config
    assert (settings.rank, settings.lora_alpha) == (config["r"], config["lora_alpha"])
    assert settings.rslora == config.get("use_rslora", False)
    assert settings.dora == config.get("use_dora", False)
    assert settings.head == ("modules_to_save" in config)


def test_a_folder_of_peft_on_convolutions_gives_the_logits_of_peft(tmp_path: Path) -> None:
    base, x = resnet(), images()
    fitted = load(base, save(base, tmp_path, r=2, lora_alpha=4, target_modules=r"layer.*conv\d", use_dora=True))
    with torch.no_grad():
        assert (fitted.defense.logits(x, DRAW) - by_peft(base, tmp_path, x)).abs().max() < 1e-4


def test_its_parameters_count_as_trained_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = vit()
    fitted = load(base, save(base, tmp_path / "mine", **QKV))
    count = 2 * 4 * (32 + 3 * 32)  # blocks, rank, sides of the projection
    assert (fitted.here, fitted.elsewhere, fitted.nominal, fitted.updated) == (0, count, count, count)
    assert fitted.train_seconds is None
    assert fitted.given and fitted.queries is None and not fitted.uses_train_sigma
    said = "lora takes rank=4, lora_alpha=6.0, rslora=False, dora=False, targets=layers:qkv, head=False from mine/"
    assert [note.startswith(said) for note in fitted.notes] == [True]
    assert said in capsys.readouterr().err
    assert "does not state the weights of its base" in fitted.notes[0]


def test_settings_of_the_folder_are_named_and_other_ones_refused(tmp_path: Path) -> None:
    folder = save(vit(), tmp_path, **QKV)
    given: dict[str, Any] = {"defenses": "lora", "dataset": TINY, "weights": str(folder)}
    (plan,) = make_plans(RunOptions(**given, settings=("rank=4", "epochs=3")))
    assert plan.changed == {"rank": 4, "epochs": 3, "lora_alpha": 6, "targets": "layers:qkv"}
    with pytest.raises(BenchError, match=r"--set rank=8: .* have rank=4; leave --set rank out"):
        make_plans(RunOptions(**given, settings=("rank=8",)))
    with pytest.raises(BenchError, match="is a folder, and full takes none"):
        make_plans(RunOptions(**given | {"defenses": "full"}))


def reconfigure(folder: Path, **changes: Any) -> None:
    file = folder / peft_folders.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "bias=all, which lora cannot take; merge it"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"rank_pattern": {"fc1": 2}}, "rank_pattern="),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"a_newer_setting": 3}, "a_newer_setting=3"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"peft_type": "LOHA"}, "peft_type LOHA is not LORA"),
        ({"r": 0}, "r in adapter_config.json must be a whole number from 1"),
        ({"r": True}, "r in adapter_config.json must be"),
        ({"lora_alpha": "16"}, "lora_alpha in adapter_config.json must be a number"),
        ({"use_dora": "yes"}, "use_dora in adapter_config.json must be true or false"),
        ({"r": 5}, "has shape [4, 32], the model's has [5, 32]"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"target_modules": ["qkv", "fc1"]}, "fc1.lora_A.weight is missing"),
        ({"target_modules": ["nothing"]}, "has no layer nothing"),
        ({"modules_to_save": ["head"]}, "head.weight is missing"),
    ],
)
def test_a_config_that_is_another_function_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    base = vit()
    save(base, tmp_path, **QKV)
    reconfigure(tmp_path, **changes)
    with pytest.raises(BenchError) as e:
        load(base, tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if "blocks.0" not in k}, "is missing"),
        (lambda t: t | {"base_model.model.head.weight": torch.zeros(10, 32)}, "head.weight is unknown to the model"),
        (lambda t: t | {"base_model.model.blocks.0.mlp.fc1.lora_A.weight": torch.zeros(4, 32)}, "is unknown to the"),
        (lambda t: {f"vit.{k}": v for k, v in t.items()}, "is not a tensor of peft"),
        (lambda t: {k: v / 0 for k, v in t.items()}, "not finite"),
        (lambda t: {"base_model.model.head.weight": torch.zeros(10, 32)}, "has no LoRA adapter"),
    ],
)
def test_every_tensor_is_used_and_none_is_missing(tmp_path: Path, change: Any, words: str) -> None:
    base = vit()
    file = save(base, tmp_path, **QKV) / peft_folders.WEIGHTS
    save_file(change(load_file(file)), file)
    with pytest.raises(BenchError) as e:
        load(base, tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_folder_without_safetensors_or_config_is_refused(tmp_path: Path) -> None:
    save(vit(), tmp_path, **QKV)
    (tmp_path / peft_folders.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(BenchError, match="pickles are refused; save it again"):
        peft_folders.read(tmp_path)
    (tmp_path / peft_folders.CONFIG).unlink()
    with pytest.raises(BenchError, match=r"has no adapter_config\.json"):
        peft_folders.read(tmp_path)


def test_half_precision_is_reported(tmp_path: Path) -> None:
    base = vit()
    file = save(base, tmp_path, **QKV) / peft_folders.WEIGHTS
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    assert "stored as float16, computed in float32" in load(base, tmp_path).notes[0]


# Written ----------------------------------------------------------------------------------------------

OURS: list[dict[str, Any]] = [
    {},
    {"targets": "attention", "head": True},
    {"targets": "qv", "rank": 3},
    {"targets": "qv", "rank": 3, "rslora": True},
    {"targets": "qv", "dora": True},
    {"targets": "layers:blocks.1.mlp.fc1+blocks.0.attn.proj", "dora": True},
]


def changed(base: LocalBase, name: str) -> LocalBase:
    """Return the base with other values in one tensor."""
    model = timm_model(base)
    with torch.no_grad():
        model.get_parameter(name).add_(0.1)
    module = Classifier(model, (0.3,), (0.4,))
    return LocalBase(base.name, module, lambda classes: model, 10, {}, {})


def defense_of(base: LocalBase, settings: dict[str, Any]) -> LoRA:
    defense = build(base, "lora", **settings).eval()
    randomise(defense)
    assert isinstance(defense, LoRA)
    return defense


@pytest.mark.parametrize("settings", OURS)
@pytest.mark.parametrize("head", [False, True])
def test_a_folder_written_here_gives_the_same_logits_in_peft_and_here(
    tmp_path: Path, settings: dict[str, Any], head: bool
) -> None:
    base, x = vit(), images()
    defense = defense_of(base, settings)
    defense.write_folder(tmp_path, "a-base", head)
    with torch.no_grad():
        wanted = defense.logits(x, DRAW)
        assert (wanted - base.module(x)).abs().max() > 1e-2
        assert (by_peft(base, tmp_path, x) - wanted).abs().max() < 1e-5
        fitted = load(base, tmp_path)
        assert (fitted.defense.logits(x, DRAW) - wanted).abs().max() < 1e-5
    assert "does not state" not in fitted.notes[0]
    if settings.get("targets") == "qv" and not settings.get("dora"):
        assert fitted.defense.config.targets == "qv"  # taken apart again, so parameters are counted as trained
        assert fitted.defense.config.rank == 3


def test_a_folder_written_here_is_refused_on_another_base(tmp_path: Path) -> None:
    base = vit()
    defense_of(base, {}).write_folder(tmp_path, "a-base", head=False)
    with pytest.raises(BenchError, match=r"trained on a base of other weights .*names a-base"):
        load(changed(vit(), "norm.weight"), tmp_path)


def test_the_heads_own_weights_do_not_bind_a_folder_that_brings_a_head(tmp_path: Path) -> None:
    base, other, x = vit(), changed(vit(), "head.weight"), images()
    defense_of(base, {}).write_folder(tmp_path, "a-base", head=True)
    with torch.no_grad():
        assert not torch.allclose(other.module(x), base.module(x))
        assert torch.allclose(
            load(other, tmp_path).defense.logits(x, DRAW), load(base, tmp_path).defense.logits(x, DRAW)
        )


def test_names_of_layers_are_short_where_their_ends_mean_no_other_layer() -> None:
    model = timm_model(classifier("vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2))
    assert peft_folders.names_of(model, ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]) == ["qkv"]
    assert peft_folders.names_of(model, ["blocks.0.attn.qkv"]) == r"blocks\.0\.attn\.qkv"
