"""A trained defense that only queries the base: one factor for each logit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.interface import Access, Defense, Draw, Schedule


class Scaled(Defense):
    access = Access.QUERY

    @dataclass(frozen=True)
    class Config(Schedule):
        pass

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(self.context.classes))

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x) * self.scale
