"""Cases of ``test_gridnoise_triton``, which runs them in a process of their own, with Triton's interpreter or a GPU.

The interpreter takes half a second for a program of the kernel, whatever its size.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from bench.smoothing import gridnoise, gridnoise_triton
from bench.smoothing.chacha import KeyStreams
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.gridnoise_triton import TritonNoise, _unsigned, chacha_words
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.rows import Rows
from bench.smoothing.thresholds import Thresholds, thresholds
from tests.helpers import chacha as definition

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU, DEVICE = torch.device("cpu"), torch.device("cpu" if INTERPRETED else "cuda")
VOTES = [Vote("estimate", 0, 0), Vote("select", 2**32 - 1, 2**40 - 1), Vote("check", 7, 2**32)]
LARGE = (3, 224, 224)  # 150,528 pixels


@triton.jit
def _stream(out, key, nonce, first):  # type: ignore[no-untyped-def]
    counter = (first + tl.arange(0, 2)).to(tl.uint32)
    n0, n1, n2 = _unsigned(nonce), _unsigned(nonce + 1), _unsigned(nonce + 2)
    words = chacha_words(counter, key, n0, n1, n2)
    place = tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + place, words.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("number", range(len(definition.VECTORS)))
def test_vectors_of_the_rfc(number: int) -> None:
    key, nonce, counter, stream = definition.vectors()[number]
    one, other = (torch.from_numpy(v.view(np.int32)).to(DEVICE) for v in (key, nonce))
    out = torch.empty(32, dtype=torch.int32, device=DEVICE)
    _stream[(1,)](out, one, other, counter)
    found = out.cpu().numpy().view(np.uint32)
    assert np.array_equal(found[:16], stream)
    assert np.array_equal(found, definition.key_stream(key, nonce, counter, 2))


def compare(noise: GridNoise, votes: list[Vote], images: torch.Tensor, at: list[int], levels: int) -> None:
    """Compare the kernel with the definition, and with the pixels of the CPU to the last bit."""
    kernel = TritonNoise(noise._streams, noise._table, levels - 1, DEVICE)
    found = kernel.inputs(images.to(DEVICE), Rows.of_votes(votes, at, DEVICE)).cpu()
    wanted = noise.inputs(images, Rows.of_votes(votes, at, CPU))
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    of = noise._streams.seed, noise._streams.split
    drawn = definition.draw(of, votes, images[0].numel(), noise._table)
    sums = images[at].flatten(1).numpy().astype(np.int64) + drawn
    assert np.array_equal(found.flatten(1).numpy(), sums.astype(np.float32) / np.float32(levels - 1))


@pytest.mark.parametrize(
    ("sigma", "levels", "shape", "blocks", "dtype"),
    [
        (0.25, 17, (1, 8, 8), 32, np.uint8),
        (0.12, 256, (3, 5, 7), 32, np.uint8),  # the last block is not full
        (0.5, 256, (1, 23, 23), 32, np.int16),  # 34 blocks: two programs a row, the last one nearly empty
        (1.0, 256, (3, 32, 32), 128, np.uint8),
        (0.001, 2, (1, 1, 3), 32, np.uint8),  # no thresholds at all
        (0.3, 4000, (1, 4, 4), 32, np.int16),
        pytest.param(0.25, 256, LARGE, 2048, np.uint8, marks=pytest.mark.slow),
        pytest.param(1.0, 256, LARGE, 32, np.uint8, marks=pytest.mark.slow),
    ],
)
def test_pixels_are_those_of_the_cpu(
    sigma: float,
    levels: int,
    shape: tuple[int, int, int],
    blocks: int,
    dtype: type[np.integer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gridnoise_triton, "BLOCKS", blocks)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, levels, (2, *shape)).astype(dtype))
    votes, at = (VOTES, [1, 0, 1]) if shape == (1, 8, 8) else (VOTES[1:2], [1])
    compare(GridNoise(Noise(3, "test"), sigma, levels), votes, images, at, levels)


def test_pixels_of_the_largest_images_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one program; the vote is one in which a lead is a threshold's, so lower bits are drawn."""
    monkeypatch.setattr(gridnoise_triton, "BLOCKS", 16384)
    noise, size = GridNoise(Noise(0, "test"), 0.25, 256), 150_528
    (vote,) = definition.tied_votes(noise._streams, noise._table, size, 1)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, *LARGE)).astype(np.uint8))
    compare(noise, [vote], images, [0], 256)


@pytest.mark.parametrize("size", [40, 700])
def test_lower_bits_decide_where_leading_ones_are_a_thresholds(size: int) -> None:
    vote = Vote("estimate", 3, 2**33)
    noise = GridNoise(Noise(3, "test"), 0.25, 256)
    noise._table = definition.tied_table((3, "test"), vote, size)
    leads = definition.words((3, "test"), vote, 0, size)
    assert np.isin(leads, noise._table.upper).mean() >= 0.5
    compare(noise, [Vote("estimate", 0, 0), vote], torch.zeros(1, 1, 1, size, dtype=torch.uint8), [0, 0], 256)


def test_one_threshold_and_words_of_the_ends() -> None:
    """A lead of zeros, ones, and at a single threshold, whose lower bits are the largest or zero."""
    vote, size = Vote("estimate", 3, 1), 64
    leads = definition.words((3, "test"), vote, 0, size).astype(np.uint64)
    for low in (0, 2**32 - 1):
        edges = np.sort(np.array([leads[3] << np.uint64(32) | np.uint64(low), 2**64 - 1], np.uint64))
        noise = GridNoise(Noise(3, "test"), 0.25, 256)
        noise._table = Thresholds(edges, np.full(2**16, -(2**15), np.int16), 1)
        compare(noise, [vote], torch.zeros(1, 1, 1, size, dtype=torch.uint8), [0], 256)


def test_keys_are_copied_once_and_images_may_be_views() -> None:
    kernel = TritonNoise(KeyStreams(3, "test"), thresholds(0.25, 17), 16, DEVICE)
    assert kernel._keys.get(("select", "estimate")) is kernel._keys.get(("select", "estimate"))
    images = torch.arange(2 * 2 * 64, dtype=torch.uint8).reshape(2, 2, 8, 8) % 17
    view = images[:, :1].transpose(2, 3)
    compare_view = GridNoise(Noise(3, "test"), 0.25, 17)
    compare(compare_view, VOTES[:2], view, [1, 0], 17)


def test_it_is_found_to_work_here() -> None:
    assert gridnoise._kernel(DEVICE) is TritonNoise
