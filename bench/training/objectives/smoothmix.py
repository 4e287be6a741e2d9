"""SmoothMix: mixup between an image and an adversarial one, towards the uniform prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interface import Logits, StepDraw
from bench.training.objectives.attacks import gradient, norms, within
from bench.training.objectives.method import Copies, Cost, TrainingObjective, log_mean, ramp, repeated, smoothed_loss


@dataclass(frozen=True)
class SmoothMix(TrainingObjective):
    """The cross-entropy of noisy copies, plus mixup with an unrestricted adversary (Jeong et al. 2021, 2111.09277).

    ``steps`` steps of length ``alpha`` along the gradient of the smoothed loss lead to the adversary. Between the image
    and the adversary, at a share s uniform on (0, 1/2), the target is (1 - s) * the smoothed prediction + s * uniform;
    KL(target || prediction) of images that are classified correctly counts by ``eta``, which rises over the first
    ``warmup`` of the training. With ``one_step`` the image is replaced by the adversary of one step, within a ball that
    grows as long.
    """

    steps: int
    copies: int
    alpha: float
    eta: float
    one_step: bool
    warmup: float  # fraction of the training

    attacks = True

    def reduced(self) -> Self:
        return replace(self, steps=min(self.steps, 2), copies=min(self.copies, 2))

    def scaled(self, factor: float) -> Self:
        return replace(self, alpha=factor * self.alpha)

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        copies = Copies(draw, self.copies)
        noise = draw.sigma * copies.normal(*x.shape[1:])
        warm = ramp(draw.done, self.warmup)
        with draw.evaluating():
            x, adversary = self._attack(logits, x, y, noise, copies, warm * self.alpha)
        out = logits(repeated(x, self.copies) + noise, copies)
        mean = log_mean(out, self.copies).exp()
        share = torch.special.ndtr(draw.normal(1)) / 2  # [B, 1], uniform on (0, 1/2)
        target = (1 - share) * mean + share / out.shape[1]
        mixed = x + share.view(-1, 1, 1, 1) * (adversary - x)
        found = logits(repeated(mixed, self.copies) + noise, copies).log_softmax(1)
        apart = F.kl_div(found, target.repeat(self.copies, 1), reduction="none").sum(1)
        right = (mean.argmax(1) == y).repeat(self.copies)
        return F.cross_entropy(out, y.repeat(self.copies)) + self.eta * warm * (right * apart).mean()

    def _attack(
        self, logits: Logits, x: Tensor, y: Tensor, noise: Tensor, copies: Copies, radius: float
    ) -> tuple[Tensor, Tensor]:
        """Return where the mixup starts, and the adversary; both in [0, 1]."""
        start = adversary = x
        for _ in range(self.steps):
            at = adversary.detach().requires_grad_()
            out = logits(repeated(at, self.copies) + noise, copies)
            slope = gradient(smoothed_loss(out, y, self.copies), at)
            adversary = (at.detach() + self.alpha * slope / (norms(slope) + 1e-8)).clamp(0, 1)
            if self.one_step and start is x:
                start = (x + within(adversary - x, radius)).clamp(0, 1)
        return start, adversary

    @property
    def cost(self) -> Cost:
        all_ = self.copies * (self.steps + 2)
        return Cost(all_, all_, self.copies * self.steps)


# MNIST: the commands with eta 5 (EXPERIMENTS.MD of smoothmix, which also has eta 1, with 3 steps at sigma .25), without
# the one-step adversary. CIFAR-10: those of smoothing-catrs, which chose between both.
RELEASED = {
    "MNIST": tuple(SmoothMix(steps, 4, 1.0, 5.0, False, 10 / 90) for steps in (2, 4, 8)),
    "CIFAR-10": tuple(
        SmoothMix(4, 2, alpha, 5.0, one_step, 10 / 150) for alpha, one_step in ((0.5, False), (1.0, True), (2.0, True))
    ),
}
