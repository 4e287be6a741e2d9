"""What a training objective is: a loss with its constants, what a step of it costs, and what its losses share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interface import Draw, Logits, StepDraw

DEFAULT = "CIFAR-10"  # whose constants other data sets take where none are published for them
LEVELS = 0.25, 0.5, 1.0  # of the noise that constants are published for
SIDES = {"MNIST": 28, "CIFAR-10": 32, "ImageNet": 224}  # of the images that constants are published for


@dataclass(frozen=True)
class Cost:
    """Passes of an image through the classifier in one training step."""

    forwards: int
    backwards: int
    attack: int = 0  # those of the backward passes that end at the image, without gradients of weights

    @property
    def passes(self) -> int:
        """Their cost in forward passes: a backward pass costs about two, one to the image alone about one."""
        return self.forwards + 2 * self.backwards - self.attack


@dataclass(frozen=True)
class TrainingObjective(ABC):
    """A loss of a classifier under noise; satisfies ``interface.Objective``. Its fields are its constants."""

    attacks: ClassVar[bool] = False  # whether it needs gradients with respect to the image
    remark: str = field(default="", kw_only=True, compare=False, repr=False)  # what a reader must know of the constants

    @abstractmethod
    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: The classifier, from noisy pixels [B, C, H, W] to logits.
            x: Clean pixels [B, C, H, W] in [0, 1].
            y: Labels [B].
            draw: The step's randomness, and its place in the training.
        """

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """What a training step costs, for each image of its batch."""

    def constants(self) -> dict[str, Any]:
        """Return the constants by name, as JSON: part of the identity of trained weights."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    def reduced(self) -> Self:
        """Return the objective with the smaller budget of the preset ``quick``."""
        return self

    def scaled(self, factor: float) -> Self:
        """Return the objective with its l2 distances multiplied; itself where it has none."""
        return self


def published(
    name: str,
    released: Mapping[str, Sequence[TrainingObjective]],
    shape: tuple[int, ...],
    sigma: float,
    quick: bool,
) -> TrainingObjective:
    """Return the objective whose constants are published for a data set and a noise level, with a remark on them.

    Images smaller than the published ones get distances that are smaller by the ratio of the sides, by which l2 norms
    of images and noise differ. Digits of 8x8 pixels, ``full`` at sigma .25 and preset ``quick``: certified at r = 0 and
    .5 are 89% and 5% after gaussian noise, 36% and 16% after SmoothAdv with MNIST's epsilon of 1, 92% and 22% with .25.

    Args:
        name: Of the objective.
        released: For each data set the objective up to sigma .25, up to .5, and above.
        shape: Of the images: channels, height, width.
        sigma: Noise level of training.
        quick: Take the budget of the preset ``quick``.
    """
    dataset = similar_dataset(shape)
    side = max(shape[1:])
    found = released.get(dataset, released[DEFAULT])[level(sigma)]
    distances = found.scaled(min(1.0, side / SIDES[dataset]))
    smaller = f"; distances times {side}/{SIDES[dataset]}, the sides of the images" if distances != found else ""
    found = distances
    made = found.reduced() if quick else found
    now, then = made.constants(), found.constants()
    words = ", ".join(k if v is True else f"{k} {v:.5g}" for k, v in now.items() if v is not False)
    origin = f"as released for {dataset} {at_noise(sigma, level(sigma))}"
    if dataset not in released:
        origin = f"none are released for {dataset}, these are those of {DEFAULT}"
    less = ", ".join(f"{k} from {then[k]:g}" for k in now if now[k] != then[k])
    reduced = f"; preset quick reduces {less}" if less else ""
    after = f"; {made.remark}" if made.remark else ""
    return replace(made, remark=f"{name}: {words}; {origin}{smaller}{reduced}{after}")


def similar_dataset(shape: tuple[int, ...]) -> str:
    """Return the data set with published constants that images of ``shape`` (channels, height, width) are most like.

    Grey images take MNIST's, colour images with a side above 64 ImageNet's, all others CIFAR-10's.
    """
    channels, *sides = shape
    return "MNIST" if channels == 1 else "ImageNet" if max(sides) > 64 else "CIFAR-10"


def level(sigma: float) -> int:
    """Return the place of a noise level among the published ones: 0 up to .25, 1 up to .5, 2 above."""
    return (sigma > 0.25) + (sigma > 0.5)


def at_noise(sigma: float, place: int) -> str:
    """Return the noise level that constants are published for, in words; ``place`` is its place among ``LEVELS``."""
    return "at this noise" if sigma == LEVELS[place] else f"at sigma {LEVELS[place]:g}"


def ramp(done: float, warmup: float) -> float:
    """Return the factor that rises from .1 to 1 in ten stairs over the first ``warmup`` of the training.

    As released, where it rises with each of the first ten epochs.
    """
    return min(1.0, (math.floor(10 * done / warmup + 1e-9) + 1) / 10)  # 1e-9: a step that begins a stair is on it


class Copies:
    """The randomness of several copies of a batch, joined into one; satisfies ``interface.Draw``."""

    def __init__(self, draw: Draw, count: int) -> None:
        self.sigma = draw.sigma
        self._draw, self._count = draw, count

    def normal(self, *shape: int) -> Tensor:
        return torch.cat([self._draw.normal(*shape) for _ in range(self._count)])


def repeated(x: Tensor, count: int) -> Tensor:
    """Return ``count`` copies of a batch [B, C, H, W], one after the other."""
    return x.repeat(count, 1, 1, 1)


def noisy(x: Tensor, draw: Draw) -> Tensor:
    """Add noise of the draw's level to pixels [B, C, H, W]."""
    return x + draw.sigma * draw.normal(*x.shape[1:])


def log_mean(out: Tensor, copies: int) -> Tensor:
    """Return the log of the mean probabilities [B, classes] of the copies' logits [copies * B, classes]."""
    logs = torch.stack(out.log_softmax(1).chunk(copies))
    return logs.logsumexp(0) - math.log(copies)


def smoothed_loss(out: Tensor, y: Tensor, copies: int) -> Tensor:
    """Return the loss of the soft smoothed classifier, summed over the images: attacks raise it."""
    return F.nll_loss(log_mean(out, copies), y, reduction="sum")


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of each row, from log-probabilities."""
    return (p.exp() * (p - q)).sum(1)
