"""A broken defense: one logit too few."""

from torch import Tensor

from bench.interface import Access, Defense, Draw


class WrongShape(Defense):
    access = Access.QUERY

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x)[:, :-1]
