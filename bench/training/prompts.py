"""Decoders from an encoder's features to a visual prompt, small enough to be trained by queries."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.training.autoencoder import PatchEncoder

VERSION = 1  # raise it whenever prompts, or the decoders' initial weights, would change


class Decoder(nn.Module):
    """Map normalised features [B, ...], concatenated with a trainable trigger, to a prompt."""

    def __init__(self, normalise: nn.Module, trigger: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.trigger = nn.Parameter(trigger)
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        trigger = self.trigger.expand(len(features), *self.trigger.shape)
        return cast(Tensor, self.body(torch.cat([self.normalise(features), trigger], dim=1)))


def blackvip_decoder(width: int, channels: int) -> Decoder:
    """Make BlackVIP's decoder: features and trigger as 32 planes of 7x7, doubled five times to 224x224."""
    planes, side = 32, 7
    if width >= planes * side**2:
        raise BenchError(f"coordinator: an encoder of width {width} leaves no space for a trigger; use a smaller one")
    body: list[nn.Module] = [nn.Unflatten(1, (planes, side, side))]
    for spread, out in ((64, 64), (64, 32), (32, 32), (32, 16)):
        body += [
            nn.ConvTranspose2d(planes, spread, 2, 2, groups=planes),
            nn.ConvTranspose2d(spread, out, 1, bias=False),
            nn.BatchNorm2d(out, momentum=None),  # None: the mean over the batches of training mode, here one
            nn.GELU(),
        ]
        planes = out
    body.append(nn.ConvTranspose2d(planes, channels, 2, 2, bias=False))
    return Decoder(nn.Identity(), torch.rand(32 * side**2 - width) / 10, nn.Sequential(*body))


def patch_decoder(encoder: PatchEncoder, channels: int) -> Decoder:
    """Make one transposed convolution from tokens to patches, initialised to zero, that is, to no prompt."""
    components = encoder.width // 2
    body = nn.ConvTranspose2d(components + 1, channels, encoder.patch, encoder.patch)
    for p in body.parameters():
        nn.init.zeros_(p)
    trigger = torch.rand(1, encoder.grid, encoder.grid) / 10
    return Decoder(Whitening(encoder.width, components), trigger, body)


class Whitening(nn.Module):
    """The leading principal components of a feature map, scaled to variance 1; set by the batch in training mode.

    SPSA perturbs all weights equally. The mean of raw features alone has a third of the energy, and would limit the
    step to a size far too small for all other components.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("map", torch.eye(width)[:, :components].contiguous())

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            rows = z.movedim(1, -1).flatten(0, -2)
            variance, axes = torch.linalg.eigh(torch.cov(rows.T))
            leading = slice(-self.map.shape[1], None)
            self.mean.copy_(rows.mean(0))
            self.map.copy_(axes[:, leading] / variance[leading].clamp(min=1e-6).sqrt())
        return torch.einsum("bwij,wc->bcij", z - self.mean[:, None, None], self.map)
