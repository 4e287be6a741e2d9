"""A broken defense: training changes an attribute that is neither a parameter nor a buffer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.interface import Access, Defense, Draw, Schedule


class HiddenState(Defense):
    access = Access.QUERY

    @dataclass(frozen=True)
    class Config(Schedule):
        pass

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(()))
        self.steps = 0

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        self.steps += self.training
        return self.context.base(x) * self.scale + self.steps
