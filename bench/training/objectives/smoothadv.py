"""SmoothAdv: adversarial training of the smoothed classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from bench.interface import Logits, StepDraw
from bench.training.objectives.attacks import ddn, pgd
from bench.training.objectives.method import Copies, Cost, TrainingObjective, ramp, repeated


@dataclass(frozen=True)
class SmoothAdv(TrainingObjective):
    """The cross-entropy of ``copies`` noisy copies of an attacked image (Salman et al. 2019, arXiv 1906.04584).

    The attack raises the loss of the mean probabilities of the same copies, within an l2 ball whose radius rises to
    ``epsilon`` over the first ``warmup`` of the training. The weights are trained on all copies (released option
    --train-multi-noise).
    """

    steps: int
    copies: int
    epsilon: float
    warmup: float  # fraction of the training

    attacks = True
    attack: ClassVar[Callable[..., Tensor]] = staticmethod(pgd)

    def reduced(self) -> Self:
        return replace(self, steps=min(self.steps, 2), copies=min(self.copies, 2))

    def scaled(self, factor: float) -> Self:
        return replace(self, epsilon=factor * self.epsilon)

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        copies = Copies(draw, self.copies)
        noise = draw.sigma * copies.normal(*x.shape[1:])
        epsilon = self.epsilon * ramp(draw.done, self.warmup)
        with draw.evaluating():
            delta = self.attack(logits, x, y, noise, draw, steps=self.steps, epsilon=epsilon)
        out = logits(repeated(x + delta, self.copies) + noise, copies)
        return F.cross_entropy(out, y.repeat(self.copies))

    @property
    def cost(self) -> Cost:
        all_ = self.copies * (self.steps + 1)
        return Cost(all_, all_, self.copies * self.steps)


@dataclass(frozen=True)
class SmoothAdvDDN(SmoothAdv):
    """``SmoothAdv`` with the attack DDN."""

    attack = staticmethod(ddn)


def _released(
    cls: type[SmoothAdv], steps_of_imagenet: int, epsilons_of_imagenet: tuple[int, int, int], remark: str = ""
) -> Mapping[str, tuple[SmoothAdv, ...]]:
    """Return the constants of the commands (EXPERIMENTS.MD of smoothmix and smoothing-catrs), of ImageNet of the logs.

    Of ImageNet those of the released certificates that lead at most radii. The commands divide epsilon by 256.
    """
    mnist = cls(10, 4, 255 / 256, 10 / 90, remark=remark)
    cifar = (cls(10, copies, eps / 256, 10 / 150, remark=remark) for copies, eps in ((4, 256), (8, 256), (2, 512)))
    imagenet = (cls(steps_of_imagenet, 1, eps / 256, 1 / 90) for eps in epsilons_of_imagenet)
    return {"MNIST": (mnist, mnist, mnist), "CIFAR-10": tuple(cifar), "ImageNet": tuple(imagenet)}


PGD = _released(SmoothAdv, 1, (255, 255, 512))
DDN = _released(SmoothAdvDDN, 2, (512, 512, 512), "those of PGD, since no commands are released for DDN")
