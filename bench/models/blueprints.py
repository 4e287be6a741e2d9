"""What a base classifier is before its weights are loaded: ``Blueprint``, made of a card's recipe or a timm config.

A blueprint opens its weights itself, from safetensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.data.card import Card
from bench.data.split import Split
from bench.errors import BenchError, one_line
from bench.interface import Schedule
from bench.models.base import Classifier, LocalBase
from bench.models.labels import Names
from bench.models.timm_configs import Described, described
from bench.models.timm_models import Architecture

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value a channel


@dataclass(frozen=True)
class Weights:
    """Where a blueprint's weights are."""

    open: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]  # reads them: tensors, and the record of their source
    adapt: bool  # let timm rename keys and resize position embeddings; False: they must fit key by key


@dataclass(frozen=True)
class Blueprint:
    """A base classifier before its weights are loaded."""

    card: Card
    name: str
    architecture: str  # timm's name
    args: dict[str, Any]  # further arguments of timm.create_model
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None  # height and width it takes; None: the card's
    classes: int  # of the weights, not of the card; 0: no head
    config: dict[str, Any] | None = None  # timm's pretrained_cfg where it is not the architecture's own
    weights: Weights | None = None  # None: fresh ones
    names: tuple[Names, ...] = ()  # what the weights' own config calls their classes
    size_from: str = "the card's recipe"  # where the size comes from
    mean_from: str = "the card"  # where mean and std come from
    interpolation: str = ""  # with which the config has images resized; here it is bilinear
    schedule: Schedule | None = None  # clean training on the card's data, if any
    only: tuple[int, ...] = ()  # the card's labels that this training is on, in the order of its head; empty: all

    @property
    def made_for(self) -> int:
        """How many classes the base tells apart once its training, if any, is done; 0: it has no head."""
        return self.classes if self.schedule is None else len(self.only) or len(self.card.classes)

    def describe(self) -> dict[str, Any]:
        """What the tensors do not tell, JSON-able."""
        return {"architecture": self.architecture, "args": self.args, "resize": self.size and list(self.size)}

    @property
    def _timm(self) -> Architecture:
        return Architecture(f"base {self.name}", self.architecture, self.args, self.config)

    def fresh(self, classes: int) -> Classifier:
        """The architecture with fresh weights, on the CPU. Raises BenchError where timm cannot make it."""
        return Classifier(self._timm.create(classes), self.mean, self.std, self.size)

    def load(self) -> tuple[Classifier, dict[str, Any]]:
        """The architecture with its stored weights, on the CPU, and the record of their source.

        Raises BenchError where they cannot be read, do not fit, or make no logits of the card's images.
        """
        assert self.weights is not None
        stored, record = self.weights.open()
        stored, normalisation = unwrap(stored)
        model, remarks = self._timm.load(self.classes, stored, record["file"], self.weights.adapt)
        record |= {"remarks": remarks} if remarks else {}
        record |= {"normalisation": record["file"]} if normalisation else {}
        mean, std = normalisation or (self.mean, self.std)
        try:
            module = Classifier(model, mean, std, self.size).eval()
            with torch.inference_mode():
                out = module(torch.zeros(1, *self.card.shape))
        except Exception as e:  # here too
            shape = "x".join(map(str, self.card.shape))
            raise BenchError(f"base {self.name} cannot take {shape} images: {one_line(e)}") from None
        if self.classes and tuple(out.shape) != (1, self.classes):
            raise BenchError(f"base {self.name} gives {list(out.shape)} for an image, not [1, {self.classes}] logits")
        if not all(v.isfinite().all() for v in (out, module.mean, module.std)):
            raise BenchError(f"base {self.name}: its mean, std or logits are not finite; give the right mean and std")
        return module, record

    def base(self, module: Classifier, meta: dict[str, Any], device: torch.device) -> LocalBase:
        """The base made of this blueprint: ``module``, which it freezes; ``meta`` is what to record of it."""

        def untrained(classes: int) -> nn.Module:
            return self.fresh(classes).to(device)

        normalisation = {"mean": module.mean.flatten().tolist(), "std": module.std.flatten().tolist()}
        meta = meta | {"preprocessing": self._preprocessing(normalisation, meta.get("source", {}))}
        classes: int = module.model.num_classes  # type: ignore[assignment]
        return LocalBase(self.name, module, untrained, classes, meta, self.describe() | normalisation)

    def _preprocessing(self, normalisation: Mapping[str, list[float]], source: Mapping[str, Any]) -> dict[str, Any]:
        """What becomes of an image before the model sees it, and what says so."""
        return {
            "from": list(self.card.shape[1:]),
            "size": list(self.size or self.card.shape[1:]),
            "resampling": None if self.size is None else "bilinear",
            "config_resampling": self.interpolation or None,
            "size_from": self.size_from,
            **normalisation,
            "normalisation_from": source.get("normalisation", self.mean_from),
        }

    def accuracy(self, module: Classifier, split: Split, device: torch.device) -> float:
        """The part of a split's clean images, 0 to 1, that ``module`` gets right; freezes it."""
        right, total = self.base(module, {}, device).accuracy(split, list(range(len(split))))
        return right / total


def from_config(card: Card, name: str, config: Mapping[str, Any], weights: Weights, file: str) -> Blueprint:
    """The blueprint of a timm config read from ``file``. Raises BenchError where it does not fit the card."""
    return from_described(card, name, described(f"base {name}", config, file), weights)


def from_described(card: Card, name: str, found: Described, weights: Weights) -> Blueprint:
    """The blueprint of a described timm model. Raises BenchError where its channels cannot take the card's images."""
    if card.shape[0] not in (1, found.channels):
        raise BenchError(f"base {name} takes {found.channels} channels; images of {card.name} have {card.shape[0]}")
    timms, size = found.architecture, card_size(card, found.size)
    made = Blueprint(card, name, timms.architecture, timms.args, found.mean, found.std, size, found.classes)
    return replace(
        made,
        config=timms.config,
        weights=weights,
        names=found.names,
        size_from=found.size_from,
        mean_from=found.mean_from,
        interpolation=found.interpolation,
    )


def card_size(card: Card, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size that images are resized to, None where it is the card's."""
    return None if size == card.shape[1:] else size


def unwrap(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Normalisation | None]:
    """A copy of ``stored`` under timm's own keys, and the mean and std it held, None where it held none.

    certbench's own files hold them, and "model." before every other key (see ``Classifier``).
    """
    own = {"mean", "std"}
    if not own <= set(stored) or not all(k in own or k.startswith("model.") for k in stored):
        return dict(stored), None
    mean, std = (tuple(stored[k].flatten().tolist()) for k in ("mean", "std"))
    return {k.removeprefix("model."): v for k, v in stored.items() if k not in own}, (mean, std)
