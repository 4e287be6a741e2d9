"""A certification task: the images, the noise, the sigma and the shape of a compute block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.interface import Draw
from bench.smoothing.noise import Noise, VoteDraw
from bench.smoothing.rows import Noisy, Rows
from bench.smoothing.votes import TILE, Span

Model = Callable[[Tensor, Draw], Tensor]  # noisy pixels [B, C, H, W] -> logits [B, classes]


@dataclass(frozen=True)
class Task:
    """The images to certify, by index, with their labels and noise, and the shape of the compute block."""

    images: Callable[[list[int]], NDArray[Any]]  # indices -> [len, C, H, W], as ``noisy`` takes them
    labels: Callable[[int], int]
    noisy: Noisy
    shape: tuple[int, int, int]
    classes: int
    sigma: float
    noise: Noise  # for a defense's own draws
    block: int  # rows
    device: torch.device
    noise_on_cpu: bool = True  # whatever the device

    def image(self, index: int) -> Tensor:
        """Return one image on the device, [1, C, H, W]."""
        return torch.from_numpy(self.images([index])).to(self.device)

    def rows(self, purpose: str, index: int, first: int = 0) -> Rows:
        """Return a block of votes for one image, numbered from ``first``."""
        return Rows.of_spans([Span(purpose, index, first, self.block)], {index: 0}, self.device)

    def logits(self, model: Model, images: Tensor, rows: Rows) -> Tensor:
        """Compute the logits of rows of the images at hand."""
        return model(self.noisy(images, rows), self.draw(rows))

    def draw(self, rows: Rows) -> Draw:
        """Return a defense's own randomness for the rows."""
        return VoteDraw(self.noise, rows, self.sigma, self.device)

    def classes_of(self, logits: Tensor) -> Tensor:
        """Return the class that each row votes for; ``classes`` if its logits hold NaN."""
        return torch.where(logits.isnan().any(1), self.classes, logits.argmax(1))


class ImageCache:
    """A task's images in memory, each read once. For one thread."""

    def __init__(self, task: Task) -> None:
        self._read = task.images
        self._held: dict[int, NDArray[Any]] = {}

    def get(self, indices: Iterable[int]) -> dict[int, NDArray[Any]]:
        """Return the images [C, H, W] by index."""
        found = {}
        for index in indices:
            if index not in self._held:
                self._held[index] = self._read([index])[0]
            found[index] = self._held[index]
        return found

    def drop(self, index: int) -> None:
        """Free an image's memory."""
        self._held.pop(index, None)


def block_rows(shape: tuple[int, int, int], device: torch.device) -> int:
    """Return the rows of a block: about a cache's worth of pixels on a CPU, enough to fill an accelerator.

    On an accelerator 256 at 224 x 224, less where they do not fit into its memory (see ``blocks.fitting_block``).
    """
    # A GPU computes a product in tiles, as many at a time as it has multiprocessors. ViT-B/16's smaller products have
    # 297 tiles of 128 x 256 at 64 rows (197 tokens each, width 768): 2.25 rounds of an H100's 132, so a quarter of 3
    # rounds is idle. At 256 rows they are 1,182 tiles, 8.95 of 9 rounds. 256 rows of pixels take 154 MB, the largest
    # activations 620 MB in float32.
    budget, most = (2**18, 256) if device.type == "cpu" else (2**26, 1024)
    rows = min(most, budget // int(np.prod(shape)))
    return int(max(TILE, 2 ** int(np.log2(max(rows, 1)))))
