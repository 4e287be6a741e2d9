"""A broken defense: ``logits`` raises an error."""

from torch import Tensor

from bench.interface import Access, Defense, Draw


class Raises(Defense):
    access = Access.NONE

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        raise RuntimeError("out of ideas\nsecond line")
