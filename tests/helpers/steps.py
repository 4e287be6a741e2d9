"""A training step whose randomness is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Scripted:
    """A draw whose noise is given; satisfies ``interface.StepDraw``. Later draws, if any, are of a fixed generator."""

    def __init__(self, sigma: float, *noise: Tensor, done: float = 1.0, rows: Tensor | None = None) -> None:
        self.sigma, self.noise, self.done = sigma, list(noise), done
        self.rows = torch.arange(len(noise[0]) if noise else 0) if rows is None else rows
        self.evaluated = 0
        self.inside = False
        self._generator = torch.Generator().manual_seed(9)

    def normal(self, *shape: int) -> Tensor:
        if self.noise:
            return self.noise.pop(0)
        return torch.randn(len(self.rows), *shape, generator=self._generator)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.evaluated += 1
        self.inside = True
        yield
        self.inside = False


def slopes(f, z):  # type: ignore[no-untyped-def]
    """Differentiate a function of a tensor by central differences."""
    found = torch.zeros_like(z)
    for i in range(z.numel()):
        step = torch.zeros_like(z).view(-1)
        step[i] = 1e-5
        found.view(-1)[i] = (f(z + step.view_as(z)) - f(z - step.view_as(z))) / 2e-5
    return found
