"""Grid noise by its definition alone, slowly: of ``bench`` it uses only the table of thresholds."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from bench.smoothing.chacha import KeyStreams
from bench.smoothing.noise import Vote
from bench.smoothing.thresholds import Thresholds

Words = NDArray[np.uint32]
VERSION = "chacha20-grid64-1"
QUARTERS = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)

# RFC 8439, section 2.3.2 and appendix A.1: key, nonce, counter, key stream.
VECTORS = [
    (
        bytes(range(32)).hex(),
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "00" * 32,
        "00" * 12,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "00" * 32,
        "00" * 12,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        "00" * 31 + "01",
        "00" * 12,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "00ff" + "00" * 30,
        "00" * 12,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        "00" * 32,
        "00" * 11 + "02",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


def vectors() -> list[tuple[Words, Words, int, Words]]:
    """The RFC's vectors as words: key [8], nonce [3], counter, key stream [16]."""
    return [
        (*(np.frombuffer(bytes.fromhex(v), "<u4").astype(np.uint32) for v in (key, nonce)), counter, as_words(stream))  # type: ignore[misc]
        for key, nonce, counter, stream in VECTORS
    ]


def as_words(text: str) -> Words:
    return np.frombuffer(bytes.fromhex(text), "<u4").astype(np.uint32)


def key_stream(key: Words, nonce: Words, first: int, blocks: int) -> Words:
    """The words of RFC 8439's blocks from ``first`` on, [16 * blocks]."""
    start = np.empty((16, blocks), np.uint32)
    start[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    start[4:12], start[13:] = key[:, None], nonce[:, None]
    start[12] = np.arange(first, first + blocks)
    x = start.copy()
    for _ in range(10):
        for a, b, c, d in QUARTERS:
            for to, of, other, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[to] += x[of]
                mixed = x[other] ^ x[to]
                x[other] = mixed << np.uint32(bits) | mixed >> np.uint32(32 - bits)
    return (x + start).T.reshape(-1)


def words(of: tuple[int, str], vote: Vote, part: int, size: int, call: int = 0) -> Words:
    """The words of a part for each of ``size`` pixels; ``of``: seed and split."""
    text = f"{VERSION}|{of[0]}|{of[1]}|{vote.purpose}"
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=32).digest(), "<u4").astype(np.uint32)
    last = (vote.vote >> 32) + call * 2**8 + part * 2**24
    nonce = np.array([vote.image, vote.vote % 2**32, last], np.uint32)
    return key_stream(key, nonce, 0, size // 16 + 1)[:size]


def draw(of: tuple[int, str], votes: list[Vote], size: int, table: Thresholds) -> NDArray[np.int16]:
    """The noise of each vote, [len(votes), size]: a search among the thresholds for every 64-bit word."""
    upper, lower = (np.stack([words(of, v, part, size) for v in votes]).astype(np.uint64) for part in (0, 1))
    found = np.searchsorted(table.edges, upper << np.uint64(32) | lower, side="right") - table.reach
    return found.astype(np.int16)


def tied_table(of: tuple[int, str], vote: Vote, size: int) -> Thresholds:
    """A table in which the leading 32 bits of half of a vote's pixels are those of one threshold or of several.

    The thresholds lie below, at and above the pixels' words.
    """
    upper, lower = (words(of, vote, part, size).astype(np.uint64) for part in (0, 1))
    some = (upper << np.uint64(32) | lower)[::2]
    around = [some[j::4] + np.uint64(2**64 + j - 1 & 2**64 - 1) for j in range(3)]  # one below, at it, one above
    several = [some[3::4] + np.uint64(2**64 + step & 2**64 - 1) for step in (-2, -1, 0, 1, 2)]
    edges = np.unique(np.concatenate([*around, *several]))
    edges = edges[len(edges) % 2 :]
    return Thresholds(edges, np.full(2**16, -(2**15), np.int16), len(edges) // 2)


def tied_votes(streams: KeyStreams, table: Thresholds, size: int, count: int) -> list[Vote]:
    """The first votes of a run in which the leading 32 bits of a pixel are those of a threshold."""
    leads, number = np.empty(size, np.uint32), 0
    found: list[Vote] = []
    while len(found) < count:
        vote = Vote("estimate", 0, number)
        streams.fill(leads, [vote], 0)
        tied = table.upper.take(table.upper.searchsorted(leads), mode="clip") == leads
        found += [vote] if tied.any() else []
        number += 1
    return found
