"""The random bits of grid noise: ChaCha20 (RFC 8439), made of 32-bit integers, so that every device draws the same.

A key holds (version, seed, split, purpose); a nonce holds (image, vote, call, part), of 32, 40, 16 and 8 bits. Pixel i
takes word i % 16 of block i // 16. Of part 0 these are the leading 32 bits of the pixel's 64-bit word, of part 1 the
lower ones, which few pixels need (see ``thresholds``). No two of (key, nonce, block) are the same, so no bits are
shared, and the standard fixes them for good.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray
from torch import Tensor

from bench.smoothing.noise import CALLS, IMAGES, VOTES, Vote

VERSION = "chacha20-grid64-1"  # part of the identity of a run with grid noise, and of every key

CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
BLOCK = 16  # words of 32 bits
SIZE = 2**32 * BLOCK  # pixels of an image: the block counter has 32 bits
CALL = 0  # grid noise is drawn once for each vote
LEADING, LOWER = 0, 1  # parts
_NONCE = struct.Struct("<4I")  # the first block, then the nonce


def key(seed: int, split: str, purpose: str) -> bytes:
    """Return the 32 bytes of a key."""
    return hashlib.blake2b(f"{VERSION}|{seed}|{split}|{purpose}".encode(), digest_size=32).digest()


def last_nonce_word(vote_high: int, call: int, part: int) -> int:
    """Return the third word of a nonce; the first two are the image and the vote's lower 32 bits."""
    return vote_high | call << 8 | part << 24


def check_size(size: int) -> None:
    """Raise ValueError where an image has more pixels than a key stream has words."""
    if not 0 < size <= SIZE:
        raise ValueError(f"grid noise of {size} pixels: must be 1 to {SIZE}, since the block counter has 32 bits")


class KeyStreams:
    """The key streams of one (seed, split), drawn by OpenSSL on the CPU, in any thread or process."""

    def __init__(self, seed: int, split: str) -> None:
        self.seed, self.split = seed, split
        self._own = threading.local()  # an encryptor has a position, so each thread has its own encryptors
        self._zeros = b""  # what is encrypted: the result is the key stream

    def __reduce__(self) -> tuple[type[KeyStreams], tuple[int, str]]:
        return KeyStreams, (self.seed, self.split)

    def fill(
        self, words: NDArray[np.uint32], votes: Sequence[Vote], part: int, first: int = 0, call: int = CALL
    ) -> None:
        """Write the words of each vote's key stream, from its ``first`` block on, into an equal share of ``words``.

        Raises ValueError if a key, a part or a block is out of range, because its words would be another key's.
        """
        size = 4 * (len(words) // len(votes))
        last = first - -size // (4 * BLOCK)
        if not (0 <= call < CALLS and 0 <= part < 2**8 and 0 <= first <= last <= SIZE // BLOCK):
            raise ValueError(
                f"noise key out of range: draw {call} of the vote (below {CALLS}), part {part} (below 256), blocks "
                f"{first} to {last} (at most {SIZE // BLOCK})"
            )
        zeros = self._zeros  # another thread may replace it
        if len(zeros) < size:
            zeros = self._zeros = bytes(size)
        text, into = memoryview(zeros)[:size], words.view(np.uint8).data
        encryptors: dict[str, CipherContext] = self._own.__dict__
        for i, (purpose, image, vote) in enumerate(votes):
            if not (0 <= image < IMAGES and 0 <= vote < VOTES):
                raise ValueError(f"noise key out of range: image {image} (below {IMAGES}), vote {vote} (below {VOTES})")
            encryptor = encryptors.get(purpose) or self._encryptor(purpose)
            high = last_nonce_word(vote >> 32, call, part)
            encryptor.reset_nonce(_NONCE.pack(first, image, vote & 0xFFFFFFFF, high))
            encryptor.update_into(text, into[i * size : (i + 1) * size])
        if sys.byteorder == "big":
            words.byteswap(inplace=True)

    def _encryptor(self, purpose: str) -> CipherContext:
        """Return this thread's encryptor for a purpose."""
        cipher = Cipher(algorithms.ChaCha20(key(self.seed, self.split, purpose), bytes(16)), None)
        made: CipherContext = cipher.encryptor()
        self._own.__dict__[purpose] = made
        return made


class DeviceKeys:
    """The keys of purposes in a device's memory, copied there once."""

    def __init__(self, seed: int, split: str, device: torch.device) -> None:
        self._of, self._device = (seed, split), device
        self._held: dict[tuple[str, ...], Tensor] = {}

    def get(self, purposes: Sequence[str]) -> Tensor:
        """Return the words of each purpose's key, int32 [purposes, 8]."""
        wanted = tuple(purposes)
        held = self._held.get(wanted)
        if held is None:
            words = np.frombuffer(b"".join(key(*self._of, purpose) for purpose in wanted), "<i4")
            table = torch.from_numpy(words.astype(np.int32).reshape(-1, 8))
            held = self._held[wanted] = table.to(self._device)
        return held
