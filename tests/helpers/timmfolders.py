"""Tiny models as timm saves them, and a card of made-up colour images that they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from bench.data.card import Card
from bench.models.base import LocalBase
from bench.models.load import load_base
from bench.models.names import choose_base

CPU = torch.device("cpu")
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def card(classes: tuple[str, ...] = ("red", "green", "blue"), **changes: Any) -> Card:
    """Return a card of 3x8x8 images, whose data are never read."""
    vit = {"model": "vit_tiny_patch16_224", "args": VIT, "schedule": {"epochs": 0.1}}
    fields: dict[str, Any] = {
        "name": "rgb",
        "source": {"reader": "sklearn:digits"},
        "shape": (3, 8, 8),
        "classes": classes,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.2, 0.2),
        "bases": {"vit": vit},
    }
    return Card(**(fields | changes))


def save(folder: Path, name: str = "vit_tiny_patch16_224", classes: int = 3, **args: Any) -> nn.Module:
    """Write a timm folder of random weights by timm's own save_for_hf; return the model."""
    torch.manual_seed(1)
    model: nn.Module = timm.create_model(name, num_classes=classes, **(args or VIT)).eval()
    save_for_hf(model, str(folder), model_args=args or VIT, safe_serialization=True)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Change the tensors of a timm folder."""
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    """Change a timm folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def load(made: Card, base: Path, names: tuple[str, ...] = (), **given: Any) -> LocalBase:
    """Load the base of a folder or file for data with these class names. Raises BenchError as a run would."""
    train = SimpleNamespace(names=names)
    name = choose_base(made, made.preset, str(base))
    found = load_base(made, name, train, None, CPU, lambda *_: None, **given)  # type: ignore[arg-type]
    assert isinstance(found, LocalBase)
    return found
