"""Gaussian noise keyed by (seed, split, image, vote, purpose).

A vote's noise depends on its key alone, never on block, order, shard, worker or resume. The bits come from AES-128
in counter mode (NIST SP 800-38A): any vote is reached directly, no two keys share a block, and a cipher has none of
the correlations by which a weak generator inflates radii (Dahiya et al. 2024). It is also far faster than a seeded
generator per vote. Its standard fixes it for good, so a certificate can be drawn again years later.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

VERSION = "aes128ctr-boxmuller-1"  # part of every identity: change it whenever a key's values change

IMAGES, VOTES, CALLS = 2**32, 2**40, 2**16  # the counter's room for each; beyond it, keys would share bits


class Vote(NamedTuple):
    """The key of one noisy copy of one image; in training, ``image`` is the step and ``vote`` 0."""

    purpose: str
    image: int
    vote: int


class Votes(Protocol):
    """The keys of several noisy copies, in order: a list of them, or the rows of a block."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Vote]: ...


class Noise:
    """The noise of one (seed, split): a key always gives the same values, in any thread or process."""

    def __init__(self, seed: int, split: str) -> None:
        self.seed, self.split = seed, split
        self._prefix = f"{VERSION}|{seed}|{split}|"
        self._own = threading.local()  # an encryptor has a position, so each thread has its own encryptors
        self._zeros = b""

    def __reduce__(self) -> tuple[type[Noise], tuple[int, str]]:
        return Noise, (self.seed, self.split)

    def _fill(self, vote: Vote, call: int, parts: list[tuple[memoryview, int]]) -> None:
        """Write the key's bits into the given buffers in order (each has 15 spare bytes).

        Raises ValueError if the key is out of range, because its bits would be another key's.
        """
        if not (0 <= vote.image < IMAGES and 0 <= vote.vote < VOTES and 0 <= call < CALLS):
            raise ValueError(
                f"noise key out of range: image {vote.image} (below {IMAGES}), vote {vote.vote} (below {VOTES}), "
                f"draw {call} of the vote (below {CALLS})"
            )
        encryptors: dict[str, CipherContext] = self._own.__dict__
        encryptor = encryptors.get(vote.purpose)
        if encryptor is None:
            key = hashlib.blake2b((self._prefix + vote.purpose).encode(), digest_size=16).digest()
            encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            encryptors[vote.purpose] = encryptor
        # The 128-bit counter: image 32 bits, vote 40, call 16, then 40 bits that count 16-byte blocks (16 TiB).
        start = vote.image << 96 | vote.vote << 56 | call << 40
        encryptor.reset_nonce(start.to_bytes(16, "big"))
        for buffer, size in parts:
            zeros = self._zeros
            if len(zeros) < size:
                zeros = self._zeros = bytes(size)
            encryptor.update_into(memoryview(zeros)[:size], buffer)

    def words(self, votes: Votes, size: int, call: int = 0) -> NDArray[np.uint64]:
        """Return independent uniform 64-bit integers, [len(votes), size].

        ``call`` numbers the draws of one key. ``normals`` uses the same bits for the same key and call.
        """
        width = size * 8
        bits = np.empty(len(votes) * width + 15, np.uint8)
        into = bits.data
        for i, vote in enumerate(votes):
            self._fill(vote, call, [(into[i * width : (i + 1) * width + 15], width)])
        words = bits[: len(votes) * width].view("<u8").reshape(len(votes), size)
        return words.astype(np.uint64, copy=False)

    def normals(self, votes: Votes, size: int, call: int = 0) -> Tensor:
        """Return independent standard normals, float32 [len(votes), size]; ``call`` numbers the draws of one key.

        Box-Muller with 63 bits for the radius: values reach 9.3 sigma, and the mass beyond is below 1e-20.
        (The usual 24-bit uniforms stop at 5.77 sigma, an error that grows with the number of pixels.)
        """
        rows, pairs = len(votes), (size + 1) // 2
        # CTR keystreams are whole blocks: radius words are padded so that the angle bits start on a block.
        words = pairs + pairs % 2
        radius_bits = np.empty(rows * words * 8 + 15, np.uint8)
        angle_bits = np.empty(rows * pairs * 4 + 15, np.uint8)
        into_radius, into_angle = radius_bits.data, angle_bits.data
        for i, vote in enumerate(votes):
            r, a = i * words * 8, i * pairs * 4
            parts = [(into_radius[r : r + words * 8 + 15], words * 8), (into_angle[a : a + pairs * 4 + 15], pairs * 4)]
            self._fill(vote, call, parts)
        uniform = torch.from_numpy(radius_bits[: rows * words * 8].view("<i8").astype(np.int64, copy=False))
        turn = torch.from_numpy(angle_bits[: rows * pairs * 4].view("<i4").astype(np.int32, copy=False))
        uniform = uniform.view(rows, words)[:, :pairs].bitwise_and(2**63 - 1).to(torch.float32)
        radius = uniform.add_(1.0).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
        angle = turn.view(rows, pairs).to(torch.float32).mul_(math.pi / 2**31)
        return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)[:, :size]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move values made on the CPU to the device; to a GPU they are copied asynchronously from pinned memory.

    torch keeps pinned memory that is no longer used, and hands it out again once the copies from it are done.
    """
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class VoteDraw:
    """A defense's own randomness for one block of votes; satisfies ``interface.Draw``."""

    def __init__(self, noise: Noise, votes: Votes, sigma: float, device: torch.device) -> None:
        self.sigma = sigma
        self._noise, self._given, self._device = noise, votes, device
        self._calls = 0

    @cached_property
    def _votes(self) -> list[Vote]:
        """The keys of the draws, made at the first one, since most defenses draw nothing."""
        # A separate stream: a defense never sees the noise that was added to the image.
        return [Vote(f"{v.purpose}/defense", v.image, v.vote) for v in self._given]

    def normal(self, *shape: int) -> Tensor:
        self._calls += 1
        flat = self._noise.normals(self._votes, math.prod(shape), self._calls)
        return to_device(flat.reshape(len(self._votes), *shape), self._device)


class TrainDraw:
    """The randomness of one training step, keyed by (seed, step); satisfies ``interface.Draw``."""

    def __init__(self, noise: Noise, step: int, batch: int, sigma: float, device: torch.device) -> None:
        self.sigma = sigma
        self._noise, self._step, self._batch, self._device = noise, step, batch, device
        self._calls = 0

    def normal(self, *shape: int) -> Tensor:
        self._calls += 1
        flat = self._noise.normals([Vote("train", self._step, 0)], self._batch * math.prod(shape), self._calls)
        return flat.reshape(self._batch, *shape).to(self._device)
