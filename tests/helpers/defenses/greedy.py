"""A broken defense: it declares QUERY access and copies the weights."""

from torch import Tensor

from bench.interface import Access, Defense, Draw


class Greedy(Defense):
    access = Access.QUERY

    def build(self) -> None:
        self.model = self.context.base.copy()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.model(x)
