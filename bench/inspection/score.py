"""The denoiser that stands for the distribution of the data: its score, and its tangent directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.interface import Draw

Denoise = Callable[[Tensor, Draw], Tensor]  # noisy pixels [B, C, H, W] -> pixels in [0, 1]


@dataclass(frozen=True)
class Denoiser:
    """A denoiser D of Gaussian noise of ``sigma``, and the words that say where it is from.

    For the best denoiser, the mean of the clean images given the noisy one, (D(x) - x) / sigma^2 is the gradient of the
    log-density of noisy images (Tweedie's formula; Robbins 1956), and D's Jacobian is the covariance of the clean
    images given x, divided by sigma^2.
    """

    denoise: Denoise
    sigma: float
    source: str

    def score(self, x: Tensor, draw: Draw) -> Tensor:
        """Return the estimated score at noisy pixels [B, C, H, W]."""
        with torch.no_grad():
            return (self.denoise(x, draw) - x) / self.sigma**2

    def tangent(self, x: Tensor, v: Tensor, draw: Draw) -> Tensor:
        """Return the denoiser's Jacobian at each row of ``x`` times that row of ``v``.

        It stands for the projection of ``v`` on the tangent space of the clean images near x: it keeps directions in
        which the clean image may vary, and removes the others.
        """
        # Two reverse passes, since not every operation of a UNet has a forward derivative; attention has a second
        # derivative in its plain form alone.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            _, along = torch.autograd.functional.jvp(lambda rows: self.denoise(rows, draw), x, v)  # type: ignore[no-untyped-call]
        found: Tensor = along.detach()
        return found
