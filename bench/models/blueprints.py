"""Blueprints: descriptions of bases before their weights are loaded, from a card's recipe or a timm config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.data.card import Card
from bench.data.split import Split
from bench.errors import BenchError, one_line
from bench.models.base import BaseRecord, Classifier, LocalBase, Preprocessing, WeightsSource
from bench.models.labels import Names
from bench.models.resampling import DEFAULT, check_interpolation
from bench.models.timm_configs import Described, described
from bench.models.timm_models import Architecture
from bench.training.clean import CleanSchedule

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value a channel
GIVEN = "--mean and --std"


@dataclass(frozen=True)
class Weights:
    """The source of a blueprint's weights."""

    open: Callable[[], tuple[dict[str, Tensor], WeightsSource]]  # reads tensors and the record of their source
    adapt: bool  # let timm rename tensors and resize position embeddings; False: they must fit name by name


@dataclass(frozen=True)
class Blueprint:
    """A base classifier before its weights are loaded."""

    card: Card
    name: str
    architecture: str  # timm's name
    args: dict[str, Any]  # further arguments of timm.create_model
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None  # input height and width; None: the card's
    classes: int  # of the weights, not of the card; 0: no head
    config: dict[str, Any] | None = None  # timm's pretrained_cfg, where it is not the architecture's own
    weights: Weights | None = None  # None: random
    names: tuple[Names, ...] = ()  # names of the classes in the weights' own config
    size_from: str = "the card's recipe"  # source of the size
    mean_from: str = "the card"  # source of mean and std
    states_mean: bool = True  # False: the weights come with no mean and std
    interpolation: str = DEFAULT  # by which images are resized; a recipe states none
    interpolation_from: str = "certbench's default"  # source of the interpolation
    schedule: CleanSchedule | None = None  # clean training on the card's data, if any
    only: tuple[int, ...] = ()  # labels of this training, in the order of its head; empty: all

    @property
    def resampling(self) -> str | None:
        """Interpolation by which images are resized; None where they are not."""
        return None if self.size is None else self.interpolation

    @property
    def made_for(self) -> int:
        """Number of classes after the training, if any; 0: no head."""
        return self.classes if self.schedule is None else len(self.only) or len(self.card.classes)

    def describe(self) -> dict[str, Any]:
        """Return what the tensors do not determine, as JSON."""
        found = {"architecture": self.architecture, "args": self.args, "resize": self.size and list(self.size)}
        # The default is left out, since bases had no other before 0.2.
        return found if self.resampling in (None, DEFAULT) else {**found, "interpolation": self.resampling}

    @property
    def _timm(self) -> Architecture:
        return Architecture(f"base {self.name}", self.architecture, self.args, self.config)

    def fresh(self, classes: int) -> Classifier:
        """Make the model with random weights on the CPU. Raises BenchError where timm cannot make it."""
        return self._classifier(self._timm.create(classes), self.mean, self.std)

    def _classifier(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> Classifier:
        return Classifier(model, mean, std, self.size, self.interpolation)

    def load(self) -> tuple[Classifier, WeightsSource]:
        """Load the model with its stored weights on the CPU; return it and the record of the weights' source.

        Raises BenchError where the weights cannot be read, do not fit, or give no finite logits of the card's images.
        """
        assert self.weights is not None
        stored, record = self.weights.open()
        stored, normalisation = unwrap(stored)
        model, remarks = self._timm.load(self.classes, stored, record["file"], self.weights.adapt)
        if remarks := [*record.get("remarks", []), *remarks]:
            record = {**record, "remarks": remarks}
        if normalisation:
            if self.mean_from == GIVEN:
                raise BenchError(f"{GIVEN} have no effect: {record['file']} has its own; leave them out")
            record = {**record, "normalisation": record["file"]}
        mean, std = normalisation or (self.mean, self.std)
        try:
            module = self._classifier(model, mean, std).eval()
            with torch.inference_mode():
                out = module(torch.zeros(1, *self.card.shape))
        except Exception as e:  # timm's models raise errors of any type
            shape = "x".join(map(str, self.card.shape))
            raise BenchError(
                f"base {self.name} cannot take {shape} images: {one_line(e)}; give another --base"
            ) from None
        if self.classes and tuple(out.shape) != (1, self.classes):
            raise BenchError(
                f"base {self.name} gives {list(out.shape)} for an image, not [1, {self.classes}] logits; "
                f"correct num_classes in its config"
            )
        if not all(v.isfinite().all() for v in (out, module.mean, module.std)):
            raise BenchError(f"base {self.name}: its mean, std or logits are not finite; correct its mean and std")
        return module, record

    def base(self, module: Classifier, meta: BaseRecord, device: torch.device) -> LocalBase:
        """Make a base of ``module``, which it freezes; ``meta`` is for the record."""

        def untrained(classes: int) -> nn.Module:
            return self.fresh(classes).to(device)

        normalisation = {"mean": module.mean.flatten().tolist(), "std": module.std.flatten().tolist()}
        stated = meta.get("source", {}).get("normalisation", self.mean_from)
        preprocessing: Preprocessing = {
            "from": list(self.card.shape[1:]),
            "size": list(self.size or self.card.shape[1:]),
            "resampling": self.resampling,
            "resampling_from": self.interpolation_from,
            "size_from": self.size_from,
            "mean": normalisation["mean"],
            "std": normalisation["std"],
            "normalisation_from": stated,
        }
        meta = {**meta, "preprocessing": preprocessing}
        classes: int = module.model.num_classes  # type: ignore[assignment]
        return LocalBase(self.name, module, untrained, classes, meta, self.describe() | normalisation)

    def accuracy(self, module: Classifier, split: Split, device: torch.device) -> float:
        """Freeze ``module`` and return its accuracy on the clean images of a split, from 0 to 1."""
        right, total = self.base(module, {}, device).accuracy(split, list(range(len(split))))
        return right / total


def from_config(card: Card, name: str, config: Mapping[str, Any], weights: Weights, file: str) -> Blueprint:
    """Make the blueprint of a timm config read from ``file``. Raises BenchError where it does not fit the card."""
    return from_described(card, name, described(f"base {name}", config, file), weights)


def from_described(card: Card, name: str, found: Described, weights: Weights) -> Blueprint:
    """Make the blueprint of a timm model. Raises BenchError where its channels do not fit the card's images."""
    if card.shape[0] not in (1, found.channels):
        raise BenchError(
            f"base {name} takes {found.channels} channels; images of {card.name} have {card.shape[0]}; "
            f"give another --base"
        )
    timms, size = found.architecture, card_size(card, found.size)
    if size is not None:
        check_interpolation(f"base {name}", found.interpolation)
    made = Blueprint(card, name, timms.architecture, timms.args, found.mean, found.std, size, found.classes)
    return replace(
        made,
        config=timms.config,
        weights=weights,
        names=found.names,
        size_from=found.size_from,
        mean_from=found.mean_from,
        interpolation=found.interpolation,
        interpolation_from=found.interpolation_from,
    )


def card_size(card: Card, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the size that images are resized to, None where it is the card's."""
    return None if size == card.shape[1:] else size


def unwrap(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Normalisation | None]:
    """Return a copy of ``stored`` under timm's names, and its mean and std, None where it has none.

    certbench's own files have them, and the prefix "model." before every other name (see ``Classifier``).
    """
    own = {"mean", "std"}
    if not own <= set(stored) or not all(k in own or k.startswith("model.") for k in stored):
        return dict(stored), None
    mean, std = (tuple(stored[k].flatten().tolist()) for k in ("mean", "std"))
    return {k.removeprefix("model."): v for k, v in stored.items() if k not in own}, (mean, std)
