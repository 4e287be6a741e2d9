"""Grid noise on any device that torch knows (mps, xpu, cuda without Triton), in its plain 32-bit integers.

Additions and shifts of int32 wrap around as those of unsigned numbers do. Comparisons do not, so numbers that are
compared have their sign bit flipped.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.smoothing import chacha
from bench.smoothing.chacha import DeviceKeys, KeyStreams
from bench.smoothing.rows import IMAGE, PURPOSE, VOTE, VOTE_HIGH, Rows
from bench.smoothing.thresholds import Thresholds

SIGN = -(2**31)


class TorchNoise:
    """The values of ``GridNoise.draw``, drawn on one device."""

    def __init__(self, streams: KeyStreams, table: Thresholds, device: torch.device) -> None:
        self._keys = DeviceKeys(streams.seed, streams.split, device)
        self._reach = table.reach
        upper = (table.upper ^ np.uint32(2**31)).view(np.int32)
        words = (table.edges ^ np.uint64(2**63)).view(np.int64)
        self._upper, self._edges = (torch.from_numpy(v).to(device) for v in (upper, words))
        # One more that no position exceeds, so that the edge at a position can be looked up.
        self._next = torch.cat([self._upper, self._upper.new_zeros(1)])

    def draw(self, rows: Rows, size: int) -> Tensor:
        """Return noise in grid steps, int16 [rows, size]. Waits for the device once."""
        keys = self._keys.get(rows.purposes)[rows.placed[:, PURPOSE]]
        leads = chacha_words(keys, _nonces(rows.placed, chacha.LEADING), _counters(size, keys))[:, :size] ^ SIGN
        leads = leads.contiguous()
        below = torch.searchsorted(self._upper, leads)
        tied = (self._next[below] == leads) & (below < len(self._upper))
        if bool(tied.any()):  # rare, but only the device knows: this waits for it
            below[tied] = self._refined(rows.placed, keys, leads, tied)
        return (below - self._reach).to(torch.int16)

    def _refined(self, table: Tensor, keys: Tensor, leads: Tensor, tied: Tensor) -> Tensor:
        """Return the number of edges at or below the 64-bit words of the pixels that are ``tied``."""
        row, pixel = tied.nonzero(as_tuple=True)
        counter = (pixel // chacha.BLOCK).to(torch.int32)[:, None]
        words = chacha_words(keys[row], _nonces(table[row], chacha.LOWER), counter)
        lower = words.gather(1, (pixel % chacha.BLOCK)[:, None])[:, 0].long() & 0xFFFFFFFF
        return torch.searchsorted(self._edges, leads[tied].long() << 32 | lower, right=True)


def _nonces(table: Tensor, part: int) -> Tensor:
    """Return the nonces of rows, int32 [rows, 3]."""
    last = table[:, VOTE_HIGH] | chacha.last_nonce_word(0, chacha.CALL, part)
    return torch.stack([table[:, IMAGE], table[:, VOTE], last], 1)


def _counters(size: int, keys: Tensor) -> Tensor:
    """Return the numbers of the blocks that ``size`` pixels need, for each row, int32 [rows, blocks]."""
    blocks = torch.arange(-(-size // chacha.BLOCK), dtype=torch.int64, device=keys.device)
    return blocks.to(torch.int32).expand(len(keys), -1)  # beyond 2^31 the same bits


def chacha_words(keys: Tensor, nonces: Tensor, counters: Tensor) -> Tensor:
    """Return the key streams' words, int32 [rows, 16 * blocks], of RFC 8439's block function.

    Args:
        keys: int32 [rows, 8].
        nonces: int32 [rows, 3].
        counters: the numbers of blocks, int32 [rows, blocks].
    """
    shape = (4, *counters.shape)
    constants = torch.tensor(chacha.CONSTANTS, dtype=torch.int32, device=keys.device)
    a = constants[:, None, None].expand(shape)
    b, c = (half.T[:, :, None].expand(shape) for half in (keys[:, :4], keys[:, 4:]))
    d = torch.cat([counters[None], nonces.T[:, :, None].expand(3, *counters.shape)])
    start = torch.cat([a, b, c, d])
    for _ in range(10):
        # The four columns of the state at once; rolled, the four diagonals.
        a, b, c, d = _quarter_rounds(a, b, c, d)
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    words = torch.cat([a, b, c, d]).add_(start)
    return words.permute(1, 2, 0).reshape(len(keys), -1)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


def _rotated(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))  # >> repeats the sign, which is masked out
