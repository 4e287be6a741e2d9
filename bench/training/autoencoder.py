"""A small self-supervised encoder for defenses that have no pretrained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bench.interface import Job, Part, Schedule

VERSION = 1  # raise it whenever weights trained here, or features, would change: it is part of their identity


@dataclass(frozen=True)
class MaskedAutoencoder(Part):
    """A masked autoencoder (He et al. 2021, arXiv 2111.06377) trained on clean images without labels."""

    width: int = 32
    depth: int = 2
    heads: int = 4
    patch: int = 2
    side: int = 16  # larger images are resized to this
    hidden: float = 0.5  # fraction of hidden patches; the paper's 75% would leave 4 of the 16 of digits
    epochs: float = 60

    def build(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        return PatchEncoder(self, shape)

    def fit(self, module: nn.Module, job: Job) -> None:
        schedule = Schedule(epochs=self.epochs, batch=64, lr=2e-3, weight_decay=0.05, warmup=0.1)
        job.train(module, lambda x, y, draw: cast(PatchEncoder, module).reconstruction(x), schedule)


class PatchEncoder(nn.Module):
    """A small ViT: pixels [B, C, H, W] in [0, 1] to patch features [B, width, grid, grid]."""

    def __init__(self, part: MaskedAutoencoder, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.width, self.patch, self.hidden = part.width, part.patch, part.hidden
        self.grid = min(part.side, *shape[1:]) // part.patch
        self.embed = nn.Conv2d(shape[0], part.width, part.patch, part.patch)
        self.position, self.guess_position = (
            nn.Parameter(0.02 * torch.randn(1, self.grid**2, part.width)) for _ in range(2)
        )
        self.blocks = nn.Sequential(*[Block(part.width, part.heads, qkv_bias=True) for _ in range(part.depth)])
        self.norm = nn.LayerNorm(part.width)
        # Only for reconstruction.
        self.unknown = nn.Parameter(torch.zeros(1, 1, part.width))
        self.guess = nn.Sequential(
            Block(part.width, part.heads, qkv_bias=True),
            nn.LayerNorm(part.width),
            nn.Linear(part.width, shape[0] * part.patch**2),
        )

    def _tokens(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.embed(x)).flatten(2).mT + self.position

    def _fit(self, x: Tensor) -> Tensor:
        return resized(x, [self.grid * self.patch] * 2)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.norm(self.blocks(self._tokens(self._fit(x))))
        return features.mT.reshape(len(x), self.width, self.grid, self.grid)

    def reconstruction(self, x: Tensor) -> Tensor:
        """Return the mean squared error of the hidden patches, predicted from the visible ones."""
        x = self._fit(x)
        tokens = self._tokens(x)
        rows, patches, width = tokens.shape
        shown = max(1, round(patches * (1 - self.hidden)))
        order = torch.rand(rows, patches).argsort(1).to(x.device)
        index = order[:, :shown, None].expand(-1, -1, width)
        features = self.norm(self.blocks(tokens.gather(1, index)))
        whole = self.unknown.to(features.dtype).expand(rows, patches, width).scatter(1, index, features)
        wrong = self.guess(whole + self.guess_position) - F.unfold(x, self.patch, stride=self.patch).mT
        return cast(Tensor, wrong).square().mean(2).gather(1, order[:, shown:]).mean()


def resized(x: Tensor, size: list[int] | torch.Size) -> Tensor:
    """Resize images [B, C, H, W] bilinearly, antialiased where they shrink; return ``x`` itself at that size."""
    if list(x.shape[-2:]) == list(size):
        return x
    shrinks = size[0] < x.shape[-2] or size[1] < x.shape[-1]
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False, antialias=shrinks)
