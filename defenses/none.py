"""The base classifier itself, smoothed: the floor every defense must beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bench.interface import Access, Defense, Draw


class NoDefense(Defense):
    """Randomized smoothing of the untouched base (Cohen et al. 2019), which never saw noise.

    ``clip`` puts noisy pixels back into [0, 1] before the base sees them. Several methods do that on
    the way, as denoisers whose output is an image; this is the part of their gain that it makes alone.
    """

    access = Access.QUERY
    family = "none"
    trains = "none"
    paper = "1902.02918"

    @dataclass(frozen=True)
    class Config:
        """Whether noisy pixels are clipped."""

        clip: bool = False

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x.clamp(0, 1) if self.config.clip else x)
