"""Grid noise on CUDA: one Triton kernel draws it, adds it to the images and writes the pixels of F.

Imported only where Triton is installed. TRITON_INTERPRET=1, set before Triton is imported, runs it without a GPU.
The kernel computes what ``gridnoise`` and ``thresholds`` define, to the last bit.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from bench.smoothing import chacha
from bench.smoothing.chacha import DeviceKeys, KeyStreams
from bench.smoothing.rows import Rows
from bench.smoothing.thresholds import Thresholds

BLOCKS = 32  # of 16 pixels, for each program: one for each thread of a warp
LAST = np.uint32(2**32 - 1)


class TritonNoise:
    """The noisy images of ``GridNoise.inputs``, made on one device."""

    def __init__(self, streams: KeyStreams, table: Thresholds, steps: int, device: torch.device) -> None:
        self._keys = DeviceKeys(streams.seed, streams.split, device)
        self._reach, self._steps, self._count = table.reach, float(steps), len(table.edges)
        self._leaps = max(1, math.ceil(math.log2(self._count + 1)))
        # Filled up with words that no lead exceeds, so that every place a search looks at can be read.
        padding = np.full(2**self._leaps + 1 - self._count, LAST)
        lower = (table.edges & np.uint64(LAST)).astype(np.uint32)
        cells = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
        below = table.upper.searchsorted(cells, side="left").astype(np.uint16)

        def place(values: NDArray[np.uint16 | np.uint32]) -> Tensor:
            return torch.from_numpy(values.view(f"i{values.itemsize}")).to(device)

        self._upper, self._lower = (place(np.concatenate([v, padding])) for v in (table.upper, lower))
        self._below = place(below)

    def inputs(self, images: Tensor, rows: Rows) -> Tensor:
        """Return noisy images, float32 [rows, C, H, W], of integer images [k, C, H, W]; never waits for the device."""
        images, table = images.contiguous(), rows.placed.contiguous()
        out = torch.empty((len(rows), *images.shape[1:]), dtype=torch.float32, device=images.device)
        size = images[0].numel()
        programs = triton.cdiv(size, chacha.BLOCK * BLOCKS)
        # Triton launches on the current device.
        with torch.cuda.device(images.device) if images.is_cuda else nullcontext():
            _noisy_images[(len(rows) * programs,)](
                out,
                images,
                table,
                self._keys.get(rows.purposes),
                self._upper,
                self._lower,
                self._below,
                size,
                programs,
                self._count,
                self._reach,
                self._steps,
                LEAPS=self._leaps,
                BLOCKS=BLOCKS,
                CALL=chacha.last_nonce_word(0, chacha.CALL, chacha.LEADING),
                LOWER=chacha.last_nonce_word(0, 0, chacha.LOWER),
                num_warps=1,
            )
        return out


@triton.jit
def _rotated(x, bits: tl.constexpr):
    return (x << bits) | (x >> (32 - bits))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _rotated(d ^ a, 16)
    c += d
    b = _rotated(b ^ c, 12)
    a += b
    d = _rotated(d ^ a, 8)
    c += d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _unsigned(place):
    return tl.load(place).to(tl.uint32, bitcast=True)


@triton.jit
def chacha_words(counter, key, n0, n1, n2):
    """Return the words of the key stream's blocks ``counter``, uint32 [blocks, 16]; ``key`` points to its 8 words."""
    zero = counter * 0
    c0, c1, c2, c3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    k0, k1, k2, k3 = _unsigned(key), _unsigned(key + 1), _unsigned(key + 2), _unsigned(key + 3)
    k4, k5, k6, k7 = _unsigned(key + 4), _unsigned(key + 5), _unsigned(key + 6), _unsigned(key + 7)
    x0, x1, x2, x3 = c0, c1, c2, c3
    x4, x5, x6, x7 = zero + k0, zero + k1, zero + k2, zero + k3
    x8, x9, x10, x11 = zero + k4, zero + k5, zero + k6, zero + k7
    x12, x13, x14, x15 = counter, zero + n0, zero + n1, zero + n2
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    # Each join adds a last axis of two: the first one is the highest bit of a word's number, 8, the last one 1.
    y0, y4 = tl.join(x0 + c0, x8 + k4), tl.join(x4 + k0, x12 + counter)
    y1, y5 = tl.join(x1 + c1, x9 + k5), tl.join(x5 + k1, x13 + n0)
    y2, y6 = tl.join(x2 + c2, x10 + k6), tl.join(x6 + k2, x14 + n1)
    y3, y7 = tl.join(x3 + c3, x11 + k7), tl.join(x7 + k3, x15 + n2)
    z0, z1, z2, z3 = tl.join(y0, y4), tl.join(y1, y5), tl.join(y2, y6), tl.join(y3, y7)
    words = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(words, (counter.shape[0], 16))


@triton.jit
def _any(flags):
    return tl.max(tl.max(flags.to(tl.int32), 1), 0) != 0


@triton.jit
def _noisy_images(
    out,
    images,
    table,
    keys,
    upper,
    lower,
    below,
    size,
    programs,
    count,
    reach,
    steps,
    LEAPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CALL: tl.constexpr,
    LOWER: tl.constexpr,
):
    """Write 16 * BLOCKS pixels of one row.

    ``table`` is that of ``rows.Rows``: place of the image, place of the key, and the words of the nonce; ``upper`` and
    ``lower`` are the halves of the ``count`` thresholds; ``below`` counts those below each cell of 16 leading bits.
    """
    row = tl.program_id(0) // programs
    entry = table + 5 * row
    image = tl.load(entry).to(tl.int64)
    key = keys + 8 * tl.load(entry + 1)
    n0, n1 = _unsigned(entry + 2), _unsigned(entry + 3)
    n2 = _unsigned(entry + 4) | CALL
    block = tl.program_id(0) % programs * BLOCKS + tl.arange(0, BLOCKS)
    counter = block.to(tl.uint32)
    pixel = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = pixel < size

    lead = chacha_words(counter, key, n0, n1, n2)
    # Thresholds with smaller leading bits: those below the lead's cell, and often the next one. Only cells of the
    # tails hold more; of these, the largest number of further ones is found bit by bit.
    at = tl.load(below + (lead >> 16).to(tl.int32)).to(tl.int32) & 0xFFFF
    at += (_unsigned(upper + at) < lead).to(tl.int32)
    more = _unsigned(upper + at) < lead
    if _any(more):
        for leap in range(LEAPS):
            there = at + (1 << (LEAPS - 1 - leap))
            known = more & (there <= count)
            further = tl.load(upper + there - 1, mask=known, other=-1).to(tl.uint32, bitcast=True) < lead
            at = tl.where(known & further, there, at)

    tied = inside & (at < count) & (_unsigned(upper + at) == lead)
    left = _any(tied)
    if left:
        word = chacha_words(counter, key, n0, n1, n2 | LOWER)
        while left:
            passed = tied & (tl.load(lower + at, mask=tied, other=0).to(tl.uint32, bitcast=True) <= word)
            at += passed.to(tl.int32)
            tied = passed & (at < count)
            tied = tied & (tl.load(upper + at, mask=tied, other=0).to(tl.uint32, bitcast=True) == lead)
            left = _any(tied)

    shown = tl.load(images + image * size + pixel, mask=inside, other=0).to(tl.int32)
    total = (shown + at - reach).to(tl.float32)
    tl.store(out + row.to(tl.int64) * size + pixel, tl.div_rn(total, steps), mask=inside)
