"""A defense that reveals the noise level of its call: class 1 for the configured level, else class 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw


class SureAtSigma(Defense):
    access = Access.NONE

    @dataclass(frozen=True)
    class Config:
        sigma: float = 0.25

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        logits = torch.zeros(len(x), self.context.classes)
        logits[:, int(draw.sigma == self.config.sigma)] = 1
        return logits
