"""The base classifier itself, smoothed: the floor every defense must beat."""

from __future__ import annotations

from torch import Tensor

from bench.interface import Access, Defense, Draw


class NoDefense(Defense):
    """Randomized smoothing of the untouched base (Cohen et al. 2019), which never saw noise."""

    access = Access.QUERY
    family = "none"
    paper = "1902.02918"

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x)
