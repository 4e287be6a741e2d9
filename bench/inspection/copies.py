"""Noisy copies of one image: the same pixels and the same noise for every run that is inspected."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bench.smoothing.noise import Noise, Vote, VoteDraw, to_device

SEED = 0  # of all noise and directions; the runs' own seeds differ
PURPOSE = "inspect"  # no vote has this purpose, so no certificate rests on this noise
DIRECTION = "inspect/direction"


@dataclass(frozen=True)
class Copies:
    """One clean image and ``count`` noisy copies of it."""

    clean: Tensor  # [C, H, W], pixels in [0, 1]
    index: int
    label: int
    sigma: float
    count: int
    noise: Noise

    @property
    def noisy(self) -> Tensor:
        """The copies [count, C, H, W]: Gaussian noise, neither rounded to the pixel grid nor clipped."""
        return self.clean + self.sigma * self._normals(PURPOSE, 0, self.count)

    def direction(self, number: int) -> Tensor:
        """Return standard normal values [C, H, W] with a key of their own."""
        return self._normals(DIRECTION, number, 1)[0]

    def directions(self) -> Tensor:
        """Return standard normal values for each copy, [count, C, H, W]."""
        return self._normals(DIRECTION, self.count, self.count)

    def draw(self, times: int = 1) -> VoteDraw:
        """Return a randomised defense's own draws, for the copies ``times`` times over: the same at every call."""
        votes = [Vote(PURPOSE, self.index, i) for i in range(self.count)] * times
        return VoteDraw(self.noise, votes, self.sigma, self.clean.device)

    def _normals(self, purpose: str, first: int, count: int) -> Tensor:
        votes = [Vote(purpose, self.index, first + i) for i in range(count)]
        flat = self.noise.normals(votes, math.prod(self.clean.shape))
        return to_device(flat.reshape(count, *self.clean.shape), self.clean.device)
