"""A sound randomised defense: its own noise comes from the draw."""

from torch import Tensor

from bench.interface import Access, Defense, Draw


class Randomised(Defense):
    access = Access.QUERY

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x + 0.1 * draw.normal(*x.shape[1:]))
