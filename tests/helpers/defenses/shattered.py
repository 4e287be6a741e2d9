"""A half-space whose pixels are quantised: its gradient is zero almost everywhere, so white-box attacks are blind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw


class Shattered(Defense):
    access = Access.NONE

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.3
        steps: int = 16

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        coarse = torch.round(x * self.config.steps) / self.config.steps
        side = coarse.flatten(1).mean(1) - self.config.threshold
        return torch.stack([-side, side] + [torch.full_like(side, -9.0)] * (self.context.classes - 2), 1)
