"""An unsound merge: it draws from torch's global state, but changes logits too little for the merge check."""

import torch
from torch import Tensor

from bench.interface import Access, Defense, Draw


class MergesAtRandom(Defense):
    access = Access.QUERY

    def build(self) -> None:
        self.shift = torch.zeros(())

    def merge(self) -> None:
        self.shift = 1e-5 * torch.randn(1, 8, 8)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x + self.shift)
