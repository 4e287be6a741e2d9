"""The random bits of grid noise: ChaCha20 (RFC 8439), made of 32-bit integers, so that every device draws the same.

A key holds (version, seed, split, purpose); a nonce holds (image, vote, call, part), of 32, 40, 16 and 8 bits. Pixel i
takes word i % 16 of block i // 16. Of part 0 these are the leading 32 bits of the pixel's 64-bit word, of part 1 the
lower ones, which few pixels need (see ``thresholds``). No two of (key, nonce, block) are the same, so no bits are
shared, and the standard fixes them for good.
"""

from __future__ import annotations

import hashlib
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
_LITTLE = sys.byteorder == "little"
_ZEROS = bytes(2**17)


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

    def __reduce__(self) -> tuple[type[KeyStreams], tuple[int, str]]:
        return KeyStreams, (self.seed, self.split)

    def fill(self, words: NDArray[np.uint32], vote: Vote, part: int, first: int = 0, call: int = CALL) -> None:
        """Write the words of a key and nonce into ``words``, from the ``first`` block on.

        Raises ValueError if vote, call, part or block is out of range, because the words would be another key's.
        """
        last = first + -(-len(words) // BLOCK)
        if not (0 <= vote.image < IMAGES and 0 <= vote.vote < VOTES and 0 <= call < CALLS and 0 <= part < 2**8):
            raise ValueError(
                f"noise key out of range: image {vote.image} (below {IMAGES}), vote {vote.vote} (below {VOTES}), "
                f"draw {call} of the vote (below {CALLS}), part {part} (below 256)"
            )
        if not 0 <= first <= last <= SIZE // BLOCK:
            raise ValueError(f"noise key out of range: blocks {first} to {last} (at most {SIZE // BLOCK})")
        encryptors: dict[str, CipherContext] = self._own.__dict__
        encryptor = encryptors.get(vote.purpose)
        if encryptor is None:
            algorithm = algorithms.ChaCha20(key(self.seed, self.split, vote.purpose), bytes(16))
            encryptor = encryptors[vote.purpose] = Cipher(algorithm, None).encryptor()
        high = last_nonce_word(vote.vote >> 32, call, part)
        start = first | vote.image << 32 | (vote.vote & 0xFFFFFFFF) << 64 | high << 96
        encryptor.reset_nonce(start.to_bytes(16, "little"))
        zeros = _ZEROS if words.nbytes <= len(_ZEROS) else bytes(words.nbytes)
        encryptor.update_into(memoryview(zeros)[: words.nbytes], words.view(np.uint8).data)
        if not _LITTLE:
            words.byteswap(inplace=True)

    def words(self, vote: Vote, part: int, count: int, first: int = 0, call: int = CALL) -> NDArray[np.uint32]:
        """Return the first ``count`` words from a block on, uint32 [count]."""
        words = np.empty(count, np.uint32)
        self.fill(words, vote, part, first, call)
        return words


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
