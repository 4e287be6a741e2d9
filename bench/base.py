"""Base classifiers: the card's recipe, trained clean once and cached, shared by every defense."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from bench import objectives, training
from bench.cache import Entry, file_sha256
from bench.cards import Card, Recipe, Split
from bench.errors import BenchError, one_line, unknown
from bench.interface import Access, Schedule

# A view that may only be queried finds its module here by number: nothing reachable from the view
# itself is a module, a parameter or a gradient.
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class Classifier(nn.Module):
    """A timm model with its normalisation inside: pixels in [0, 1] to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of pixels x [B, C, H, W]."""
        return cast(Tensor, self.model((x - self.mean) / self.std))

    def head(self) -> nn.Module:
        """The layer that turns features into logits."""
        return cast(nn.Module, self.model.get_classifier())  # type: ignore[operator]


class View:
    """The base as a defense of a given access sees it; satisfies ``interface.Base``."""

    def __init__(self, owner: BaseModel, most: Access) -> None:
        self.classes, self.sha256, self.most = owner.classes, owner.sha256, most
        self.queries = 0
        self._handle = id(owner.module)
        self._untrained = owner.untrained

    def __call__(self, x: Tensor) -> Tensor:
        if self.most < Access.QUERY:
            raise BenchError("the defense declares access = Access.NONE and asks the base; declare Access.QUERY")
        self.queries += len(x)
        if self.most == Access.QUERY:
            with torch.no_grad():
                return cast(Tensor, _modules[self._handle](x))
        return cast(Tensor, _modules[self._handle](x))

    def copy(self, classes: int | None = None) -> nn.Module:
        """A private trainable copy, with a new head where ``classes`` differs. Raises BenchError below WEIGHTS."""
        if self.most < Access.WEIGHTS:
            raise BenchError(f"the defense has {self.most.name} access and copies the base; declare Access.WEIGHTS")
        module = copy.deepcopy(_modules[self._handle]).requires_grad_(True)
        if classes not in (None, self.classes):
            module.model.reset_classifier(classes)  # type: ignore[union-attr,operator]
        return module

    def untrained(self, classes: int) -> nn.Module:
        """The same architecture with fresh weights."""
        return self._untrained(classes)


class BaseModel:
    """A loaded base classifier: the harness's side, which owns the module."""

    def __init__(
        self, name: str, module: nn.Module, untrained: Callable[[int], nn.Module], classes: int, meta: dict[str, Any]
    ) -> None:
        self.name, self.classes, self.meta = name, classes, meta
        self.module = module.eval().requires_grad_(False)
        self.untrained = untrained
        self.sha256 = state_sha256(module, name)
        _modules[id(self.module)] = self.module

    @property
    def parameters(self) -> int:
        """How many parameters the base has."""
        return sum(p.numel() for p in self.module.parameters())

    def view(self, access: Access) -> View:
        """The base with no more than ``access``."""
        return View(self, access)

    def accuracy(self, split: Split, indices: list[int]) -> tuple[int, int]:
        """Correct and all of the given clean images."""
        device = next(self.module.parameters()).device
        right = 0
        with torch.inference_mode():
            for part in np.array_split(np.array(indices), max(1, len(indices) // 250)):
                logits = self.module(torch.from_numpy(split.pixels(part)).to(device))
                right += int((logits.argmax(1).cpu().numpy() == split.labels[part]).sum())
        return right, len(indices)


def state_sha256(module: nn.Module, *also: str) -> str:
    """Hash of every tensor of a module, by name."""
    h = hashlib.sha256("|".join(also).encode())
    for key, value in sorted(module.state_dict().items()):
        h.update(f"|{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        h.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def make_model(recipe: Recipe, card: Card, classes: int) -> Classifier:
    """The recipe's architecture with fresh weights."""
    import timm

    try:
        model = timm.create_model(recipe.model, num_classes=classes, **recipe.args)
    except (RuntimeError, TypeError, ValueError) as e:
        raise BenchError(f"card {card.name}: timm cannot make {recipe.model}: {one_line(e)}") from None
    return Classifier(model, card.mean, card.std)


def recipe_name(card: Card, preset: str, base: str | None) -> str:
    """Which of the card's recipes: the one asked for, the preset's, or the first."""
    name = base or card.presets[preset].base or next(iter(card.bases))
    if name not in card.bases:
        raise unknown("base", name, card.bases)
    return name


def load_base(
    card: Card,
    name: str,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: training.Progress,
) -> BaseModel:
    """The card's base of that name: from the cache, or trained clean here once, whatever the defenses' seeds."""
    recipe = card.bases[name]
    try:
        schedule = TypeAdapter(Schedule).validate_python(recipe.schedule)
    except ValidationError as e:
        raise BenchError(f"card {card.name}: bases.{name}.schedule: {e.errors()[0]['msg']}") from None

    def untrained(classes: int) -> Classifier:
        return make_model(recipe, card, classes).to(device)

    with training.fixed_rng(0):
        module = untrained(len(card.classes))
    entry = Entry(
        f"{card.name}-base-{name}",
        {
            "model": recipe.model,
            "args": recipe.args,
            "schedule": asdict(schedule),
            "normalisation": [card.mean, card.std],
            "train": train.sha256(),
            "augment": card.augment,
            "classes": len(card.classes),
            "device": device.type,
            "training": source_sha256(training.__file__),
        },
    )
    with entry.lock():
        trained = entry.load()
        if trained is None:
            spent: list[float] = []
            job = training.TrainingJob(
                train, card.augment, 0.0, objectives.clean, 0, device, entry.checkpoint, progress, spent
            )
            job.train(module, lambda x, y, draw: objectives.clean(lambda z, _: module(z), x, y, draw), schedule)
            right, total = BaseModel(name, module, untrained, len(card.classes), {}).accuracy(
                validation, list(range(len(validation)))
            )
            meta = {"train_seconds": sum(spent), "validation_clean_accuracy": right / total}
            trained = entry.save(module.state_dict(), meta)
    module.load_state_dict(trained.state)
    return BaseModel(name, module, untrained, len(card.classes), trained.meta)


def source_sha256(file: str | None) -> str:
    """Hash of a source file: an edited one never meets weights of the old."""
    assert file is not None
    return file_sha256(Path(file))
