"""Gaussian noise rounded to the pixel grid: certificates that are true in floating point.

In floats, x + noise is not a translated Gaussian: its last bits reveal x, and radii have been certified at which an
adversarial example exists (Voracek and Hein, ICLR 2023). Here pixels are integers 0 .. levels-1, in units of
1/(levels-1), and the noise is a Gaussian rounded to integers, so round(x + noise) = x + round(noise): the smoothing
theorem of Cohen et al. (ICML 2019) holds exactly for F after rounding. F must then see only the sum, so it is
computed in integers and converted once. (In float32, x/255 + k/255 differs from (x+k)/255 in a third of the pairs.)

Every device draws the same integers: the CPU by OpenSSL, CUDA in one Triton kernel, any other in plain torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.errors import note, one_line
from bench.smoothing import chacha
from bench.smoothing.chacha import KeyStreams
from bench.smoothing.noise import Noise, Vote, Votes, to_device
from bench.smoothing.rows import Rows
from bench.smoothing.thresholds import thresholds

if TYPE_CHECKING:
    from bench.smoothing.gridnoise_torch import TorchNoise
    from bench.smoothing.gridnoise_triton import TritonNoise

CHUNK = 2**18  # pixels drawn at a time, whole blocks: a call costs as much as 2^14 pixels, and more leave the cache


class GridNoise:
    """Grid noise of one (seed, split), sigma and grid: a key always gives the same values, on any device.

    For certification; training adds float noise. ``sigma`` is for pixels in [0, 1].
    """

    version: ClassVar[str] = chacha.VERSION

    def __init__(self, noise: Noise, sigma: float, levels: int) -> None:
        self._arguments = noise, sigma, levels
        self._table, self._steps = thresholds(sigma, levels), levels - 1
        self._streams = KeyStreams(noise.seed, noise.split)
        self._plain: dict[torch.device, TorchNoise] = {}
        self._fused: dict[torch.device, TritonNoise] = {}

    def __reduce__(self) -> tuple[type[GridNoise], tuple[Noise, float, int]]:
        return type(self), self._arguments

    def draw(self, votes: Votes, size: int) -> Tensor:
        """Return noise in grid steps, int16 [len(votes), size] on the CPU; a row depends on its vote alone.

        These are the reference values: every device draws them. Raises ValueError for a key or size out of range.
        """
        chacha.check_size(size)
        keys, drawn = list(votes), np.empty((len(votes), size), np.int16)
        width = -(-size // chacha.BLOCK) * chacha.BLOCK
        rows, columns = max(1, CHUNK // width), min(CHUNK, width)
        leads = np.empty(rows * columns, np.uint32)
        for i in range(0, len(keys), rows):
            part = keys[i : i + rows]
            for begin in range(0, width, columns):
                some = leads[: len(part) * min(columns, width - begin)]
                values = self._values(part, begin // chacha.BLOCK, some)
                drawn[i : i + rows, begin : begin + columns] = values[:, : size - begin]
        return torch.from_numpy(drawn)

    def _values(self, votes: list[Vote], first: int, leads: NDArray[np.uint32]) -> NDArray[np.int16]:
        """Draw pixels [len(votes), pixels] from the ``first`` block on; ``leads``, as many words, is overwritten."""
        pixels = len(leads) // len(votes)
        self._streams.fill(leads, votes, chacha.LEADING, first)

        def lower(indices: NDArray[np.int64]) -> NDArray[np.uint32]:
            word = np.empty(len(indices), np.uint32)
            block = np.empty(chacha.BLOCK, np.uint32)
            for j, index in enumerate(indices.tolist()):  # one pixel in millions
                row, pixel = divmod(index, pixels)
                self._streams.fill(block, [votes[row]], chacha.LOWER, first + pixel // chacha.BLOCK)
                word[j] = block[pixel % chacha.BLOCK]
            return word

        return self._table.values(leads, lower).reshape(len(votes), pixels)

    def inputs(self, images: Tensor, rows: Rows) -> Tensor:
        """Return noisy images for F, one for each row of the integer images [k, C, H, W]: float32 pixels, unclipped.

        The device of ``images`` draws the noise. The bits are the same on every device, and depend on the integer sum
        alone. CUDA is never waited for; plain torch waits once a call.
        """
        if images.is_floating_point():
            raise TypeError("grid noise is added to integer pixels, not to floats")
        size, device = images[0].numel(), images.device
        chacha.check_size(size)
        if device.type == "cpu":
            return _sum(images, rows, self.draw(rows, size), self._steps)
        if device.type == "cuda" and (kernel := _kernel(device)) is not None:
            if device not in self._fused:
                self._fused[device] = kernel(self._streams, self._table, self._steps, device)
            return self._fused[device].inputs(images, rows)
        if device not in self._plain:
            from bench.smoothing.gridnoise_torch import TorchNoise  # not needed on a CPU

            self._plain[device] = TorchNoise(self._streams, self._table, device)
        return _sum(images, rows, self._plain[device].draw(rows, size), self._steps)


class AesGridNoise(GridNoise):
    """Grid noise of version 0.1.0, drawn on the CPU from AES-128: for records that were made with it."""

    version = "aes128ctr-grid64-1"
    CALL = 2**16 - 1  # the part of a vote's AES key stream used here: no bits in common with float noise

    def draw(self, votes: Votes, size: int) -> Tensor:
        keys, drawn = list(votes), np.empty((len(votes), size), np.int16)
        rows = max(1, CHUNK // size)
        for i in range(0, len(keys), rows):
            words = self._arguments[0].words(keys[i : i + rows], size, self.CALL).reshape(-1)
            leads = (words >> np.uint64(32)).astype(np.uint32)
            values = self._table.values(leads, lambda at, words=words: words[at].astype(np.uint32))  # type: ignore[misc]
            drawn[i : i + rows] = values.reshape(-1, size)
        return torch.from_numpy(drawn)

    def inputs(self, images: Tensor, rows: Rows) -> Tensor:
        noise = self.draw(rows, images[0].numel())
        return _sum(images, rows, to_device(noise, images.device), self._steps)


VERSION = GridNoise.version
KINDS: dict[str, type[GridNoise]] = {kind.version: kind for kind in (GridNoise, AesGridNoise)}  # by recorded version


def _sum(images: Tensor, rows: Rows, noise: Tensor, steps: int) -> Tensor:
    """Add noise [rows, pixels] to the rows' images in integers, and convert the sums to pixels.

    The sum is divided once, correctly rounded: equal sums give equal bits, and without noise the result is the card's
    own pixels. The divisor is a tensor on the images' device, because CUDA replaces division by a Python number with
    multiplication by its reciprocal, whose last bits differ from a CPU's.
    """
    shown = images.index_select(0, rows.at)
    total = (shown + noise.view_as(shown)).to(torch.float32)
    return total.div_(torch.full((), float(steps), device=total.device))


@lru_cache
def _kernel(device: torch.device) -> type[TritonNoise] | None:
    """Return the Triton kernel's class; None, with a note, where Triton is not installed or does not work.

    It needs a C compiler and a GPU that it supports, which only a trial shows.
    """
    try:
        from bench.smoothing.gridnoise_triton import TritonNoise  # triton comes with torch's CUDA builds only

        one = Rows.of_votes([Vote("check", 0, 0)], [0], device)
        made = TritonNoise(KeyStreams(0, ""), thresholds(0.25, 17), 16, device)
        made.inputs(torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device), one).cpu()
    except Exception as e:
        note(f"grid noise on {device} is drawn in plain torch, which is slower: {one_line(e)}; pip install triton")
        return None
    return TritonNoise
