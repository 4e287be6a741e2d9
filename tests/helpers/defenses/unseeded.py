"""An unsound defense: its randomness does not depend on the vote's key."""

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw


class Unseeded(Defense):
    access = Access.QUERY

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x + 0.1 * torch.randn_like(x))
