"""PEFT folders: adapters that the peft library saved are loaded as they are, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
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
from bench.models import peft_folders
from bench.models.base import LocalBase
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.plan import make_plans
from tests.defenses.test_peft import CPU, DRAW, build, classifier, images, resnet, trainable, vit
from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def randomise(model: nn.Module) -> None:
    """Move everything trained away from its start, where adapters have no effect."""
    with torch.no_grad(), globalstate.fixed_rng(2):
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def saved(base: LocalBase, folder: Path, **config: Any) -> nn.Module:
    """Write the folder of a random adapter of a base by peft itself; return peft's model of normalised pixels."""
    model: Any = base.view(base_access()).copy().model
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    randomise(adapted)
    adapted.save_pretrained(str(folder))
    return adapted


def base_access() -> Any:
    from bench.interface import Access

    return Access.WEIGHTS


def loaded(base: LocalBase, folder: Path, *settings: str) -> fitting.Fitted:
    (plan,) = make_plans(RunOptions(defenses="lora", dataset=TINY, weights=str(folder), settings=settings))
    train = load_split(load_card(TINY), "train").first(16)
    return fitting.fit(plan, base, train, CPU, lambda *_: None)


def pixels_to(model: nn.Module, base: LocalBase) -> Callable[[Tensor], Tensor]:
    """Return the map from pixels to logits of a model of normalised pixels."""

    def call(x: Tensor) -> Tensor:
        if base.module.size is not None:
            x = nn.functional.interpolate(x, base.module.size, mode="bilinear", align_corners=False)
        return model((x - base.module.mean) / base.module.std)

    return call


CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6, "target_modules": ["qkv"]},
    {"r": 3, "lora_alpha": 6, "target_modules": ["qkv", "fc1"], "use_rslora": True},
    {"r": 2, "lora_alpha": 5, "target_modules": ["qkv", "proj", "fc1", "fc2"], "use_dora": True},
    {"r": 2, "lora_alpha": 5, "target_modules": r"blocks\.1\..*fc\d", "lora_dropout": 0.1},
    {"r": 2, "lora_alpha": 5, "target_modules": ["fc1"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    {"r": 2, "lora_alpha": 5, "target_modules": ["qkv"], "modules_to_save": ["head"]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_of_peft_gives_the_logits_of_peft(tmp_path: Path, config: dict[str, Any]) -> None:
    base = vit()
    saved(base, tmp_path, **config)
    oracle = peft.PeftModel.from_pretrained(base.view(base_access()).copy().model, str(tmp_path)).eval()
    fitted = loaded(base, tmp_path)
    x = images()
    with torch.no_grad():
        wanted = pixels_to(oracle, base)(x)
        assert (wanted - base.module(x)).abs().max() > 1e-2
        assert (fitted.defense.logits(x, DRAW) - wanted).abs().max() < 1e-5
    assert fitted.defense.config.rank == config["r"]
