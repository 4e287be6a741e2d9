"""A median filter in front of the base."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad, unfold

from bench.interface import Access, Defense, Draw


class Median(Defense):
    """Each pixel becomes the median of its neighbourhood; nothing is trained."""

    access = Access.QUERY
    family = "denoiser"
    trains = "training-free"

    @dataclass(frozen=True)
    class Config:
        """``size``: side of the neighbourhood, odd."""

        size: int = 3

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        size, half = self.config.size, self.config.size // 2
        patches = unfold(pad(x, (half,) * 4, mode="replicate"), size).view(len(x), x.shape[1], size * size, -1)
        return self.context.base(patches.median(2).values.view_as(x))
