"""A linear classifier between two half-spaces: its smoothed version has a closed-form radius."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw


class HalfSpace(Defense):
    """Class 1 where the mean pixel exceeds ``threshold``, else class 0, whatever the number of classes."""

    access = Access.NONE

    @dataclass(frozen=True)
    class Config:
        threshold: float = 0.3

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        side = x.flatten(1).mean(1) - self.config.threshold
        return torch.stack([-side, side] + [torch.full_like(side, -9.0)] * (self.context.classes - 2), 1)
