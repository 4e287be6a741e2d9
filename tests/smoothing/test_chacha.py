"""The key streams of grid noise: RFC 8439's vectors, and streams of their own for every part of a key."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

from bench.smoothing import chacha
from bench.smoothing.chacha import KeyStreams
from bench.smoothing.gridnoise_torch import chacha_words
from bench.smoothing.noise import Vote
from tests.helpers.chacha import key_stream, vectors, words

VOTE = Vote("estimate", 5, 11)


@pytest.mark.parametrize("number", range(len(vectors())))
def test_vectors_of_the_rfc(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL through the module's own nonces, plain torch, and the definition that other tests compare with."""
    key, nonce, counter, stream = vectors()[number]
    assert np.array_equal(key_stream(key, nonce, counter, 1), stream)

    monkeypatch.setattr(chacha, "key", lambda *_: key.astype("<u4").tobytes())
    image, low, last = nonce.tolist()
    vote = Vote("any", image, (last & 0xFF) << 32 | low)
    found = np.empty(16, np.uint32)
    KeyStreams(0, "").fill(found, [vote], part=last >> 24, first=counter, call=last >> 8 & 0xFFFF)
    assert np.array_equal(found, stream)

    one, other = (torch.from_numpy(v.view(np.int32))[None] for v in (key, nonce))
    there = chacha_words(one, other, torch.tensor([[counter, counter + 1]], dtype=torch.int32))
    assert np.array_equal(there.numpy().view(np.uint32)[0], key_stream(key, nonce, counter, 2))


def test_plain_torch_counts_blocks_beyond_2_31() -> None:
    key, nonce, _, _ = vectors()[0]
    one, other = (torch.from_numpy(v.view(np.int32))[None] for v in (key, nonce))
    last = torch.tensor([[2**32 - 1]]).to(torch.int32)
    assert np.array_equal(
        chacha_words(one, other, last).numpy().view(np.uint32)[0], key_stream(key, nonce, 2**32 - 1, 1)
    )


def test_every_bit_of_the_key_counts() -> None:
    """Images to 2^32, votes to 2^40, calls to 2^16, parts to 2^8, purposes, seeds and splits have separate streams."""
    powers = [
        (1 << bit if column == 0 else 0, 1 << bit if column == 1 else 0, 1 << bit if column == 2 else 0, 1 << bit)
        for column, bits in enumerate((32, 40, 16))
        for bit in range(bits)
    ]
    keys = [(image, vote, call, 0) for image, vote, call, _ in powers]
    keys += [(0, 0, 0, 1 << bit) for bit in range(8)] + [(0, 0, 0, 0), (2**32 - 1, 2**40 - 1, 2**16 - 1, 255)]
    seen = set()
    for image, vote, call, part in keys:
        found = np.empty(4, np.uint32)
        KeyStreams(3, "test").fill(found, [Vote("estimate", image, vote)], part, call=call)
        assert np.array_equal(found, words((3, "test"), Vote("estimate", image, vote), part, 4, call))
        seen |= set(found.tolist())
    others = [(3, "test", "select"), (3, "test", "check"), (4, "test", "estimate"), (3, "validation", "estimate")]
    for seed, split, purpose in others:
        KeyStreams(seed, split).fill(found, [Vote(purpose, 0, 0)], 0)
        seen |= set(found.tolist())
    assert len(seen) == 4 * (len(keys) + len(others))  # 32-bit words of 380 meet by chance in 1.7e-5 of the cases


def test_a_stream_does_not_repeat_and_can_be_entered_anywhere() -> None:
    streams, whole = KeyStreams(0, "test"), np.empty(2**18, np.uint32)
    streams.fill(whole, [VOTE], 0)
    assert len(np.unique(whole.view(np.uint64))) == len(whole) // 2
    for first, count in ((0, 16), (1, 5), (1000, 33), (2**14 - 1, 16)):
        part = np.empty(count, np.uint32)
        streams.fill(part, [VOTE], 0, first)
        assert np.array_equal(part, whole[16 * first : 16 * first + count])


def test_the_last_block_can_be_drawn_and_no_further() -> None:
    """OpenSSL would carry the block counter into the image's word."""
    streams, two = KeyStreams(0, "test"), np.empty(32, np.uint32)
    streams.fill(two, [VOTE], 0, 2**32 - 2)
    with pytest.raises(ValueError, match=r"noise key out of range: .*blocks"):
        streams.fill(two, [VOTE], 0, 2**32 - 1)
    with pytest.raises(ValueError, match="block counter"):
        chacha.check_size(2**36 + 1)
    chacha.check_size(2**36)
    with pytest.raises(ValueError, match="0 pixels"):
        chacha.check_size(0)


@pytest.mark.parametrize(
    ("vote", "part", "call"),
    [
        *((Vote("estimate", image, 0), 0, 0) for image in (2**32, -1)),
        *((Vote("estimate", 0, vote), 0, 0) for vote in (2**40, -1)),
        *((Vote("estimate", 0, 0), part, 0) for part in (256, -1)),
        *((Vote("estimate", 0, 0), 0, call) for call in (2**16, -1)),
    ],
)
def test_a_key_out_of_range_raises(vote: Vote, part: int, call: int) -> None:
    with pytest.raises(ValueError, match="noise key out of range"):
        KeyStreams(0, "test").fill(np.empty(16, np.uint32), [vote], part, call=call)


def test_streams_are_the_same_in_any_thread_copy_and_process() -> None:
    streams, found = KeyStreams(0, "test"), {}

    def draw(number: int, of: KeyStreams) -> None:
        drawn = np.empty(3 * 4096, np.uint32)
        for _ in range(50):
            of.fill(drawn, [Vote("estimate", i, i) for i in range(3)], 0)
        found[number] = drawn

    copies = [streams, streams, streams, copy.deepcopy(streams), pickle.loads(pickle.dumps(streams))]
    threads = [threading.Thread(target=draw, args=item) for item in enumerate(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = np.concatenate([words((0, "test"), Vote("estimate", i, i), 0, 4096) for i in range(3)])
    assert len(found) == len(copies)
    assert all(np.array_equal(drawn, wanted) for drawn in found.values())
