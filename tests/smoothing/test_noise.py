"""Noise: a pure function of its key, standard normal to the tails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.smoothing.noise import Noise, TrainDraw, Vote, VoteDraw

CPU = torch.device("cpu")
keys = st.tuples(
    st.sampled_from(["select", "estimate", "train"]), st.integers(0, 2**32 - 1), st.integers(0, 2**40 - 1)
).map(lambda t: Vote(*t))


@given(votes=st.lists(keys, min_size=1, max_size=40), size=st.integers(1, 70), cut=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_rows_do_not_depend_on_the_block(votes: list[Vote], size: int, cut: int) -> None:
    noise = Noise(3, "test")
    whole = noise.normals(votes, size)
    alone = torch.cat([Noise(3, "test").normals([v], size) for v in votes])
    parts = torch.cat([noise.normals(p, size) for p in (votes[cut:], votes[:cut]) if p])
    assert torch.equal(whole, alone)
    assert torch.equal(whole, parts.roll(len(votes[:cut]), 0))


@given(one=keys, other=keys)
@settings(max_examples=60, deadline=None)
def test_every_part_of_the_key_counts(one: Vote, other: Vote) -> None:
    noise = Noise(0, "test")
    same = torch.equal(noise.normals([one], 8), noise.normals([other], 8))
    assert same == (one == other)
    base = noise.normals([one], 8)
    assert not torch.equal(base, Noise(1, "test").normals([one], 8))
    assert not torch.equal(base, Noise(0, "validation").normals([one], 8))
    assert not torch.equal(base, noise.normals([one], 8, call=1))


def test_every_bit_of_the_key_counts() -> None:
    """Images to 2^32, votes to 2^40, calls to 2^16 and every purpose have separate streams."""
    noise, seen = Noise(0, "test"), set()
    powers = (
        [(1 << b, 0, 0) for b in range(32)] + [(0, 1 << b, 0) for b in range(40)] + [(0, 0, 1 << b) for b in range(16)]
    )
    for image, vote, call in [(0, 0, 0), *powers]:
        seen |= set(noise.words([Vote("estimate", image, vote)], 4, call)[0].tolist())
    purposes = ("select", "check", "train", "estimate/defense")
    for purpose in purposes:
        seen |= set(noise.words([Vote(purpose, 0, 0)], 4)[0].tolist())
    assert len(seen) == 4 * (1 + len(powers) + len(purposes))
    long = noise.words([Vote("estimate", 0, 0)], 2**18)[0]  # two MiB of one stream: no block comes twice
    assert len(np.unique(long)) == len(long)


def test_values_never_change() -> None:
    """Changing the stream would silently change every certificate: bump noise.VERSION with these values."""
    found = Noise(7, "test").normals([Vote("estimate", 5, 11)], 5)[0]
    assert found.tolist() == pytest.approx(GOLDEN, abs=1e-6)


GOLDEN = [1.1027404, 0.6980299, 1.1895381, 0.3850619, -1.7624006]


def test_distribution_is_standard_normal() -> None:
    """Fixed seed; false-alarm rate of each check at most 1e-6 for a random seed."""
    x = Noise(0, "test").normals([Vote("estimate", i, 0) for i in range(1000)], 2000).numpy().astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4.9 / np.sqrt(n)
    assert abs(x.var() - 1) < 4.9 * np.sqrt(2 / n)
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-6
    for level in (2.0, 3.0, 4.0, 4.5):
        p = 2 * stats.norm.sf(level)
        assert stats.binomtest(int((np.abs(x) > level).sum()), n, p).pvalue > 1e-6
    # Neighbours in a row, the two halves of a pair, and rows are uncorrelated.
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:, :1000], x[:, 1000:]), (x[:-1], x[1:])):
        assert abs((a * b).mean()) < 4.9 / np.sqrt(a.size)


def test_tail_reaches_beyond_24_bit_uniforms() -> None:
    """The largest radius word gives more than 9 sigma; 24-bit uniforms stop at 5.77."""

    class AllOnes(Noise):
        def _fill(self, vote: Vote, call: int, parts: list[tuple[memoryview, int]]) -> None:
            for buffer, size in parts:
                buffer[:size] = bytes(size)  # the radius word 0 is the smallest uniform, the angle word 0 the angle 0

    x = AllOnes(0, "test").normals([Vote("estimate", 0, 0)], 2)
    assert 9 < float(x[0, 0]) < 10
    assert torch.isfinite(x).all()


def test_a_defense_never_sees_the_noise_of_its_input() -> None:
    noise, votes = Noise(0, "test"), [Vote("estimate", 1, 2), Vote("estimate", 1, 3)]
    draw = VoteDraw(noise, votes, 0.25, CPU)
    first, second = draw.normal(1, 4, 4), draw.normal(1, 4, 4)
    assert first.shape == (2, 1, 4, 4)
    added = noise.normals(votes, 16).view(2, 1, 4, 4)
    assert not torch.equal(first, second)
    assert not torch.equal(first, added)
    own = [Vote("estimate/defense", v.image, v.vote) for v in votes]
    assert torch.equal(first.view(2, 16), noise.normals(own, 16, call=1))
    assert torch.equal(second.view(2, 16), noise.normals(own, 16, call=2))
    again = VoteDraw(noise, votes[1:], 0.25, CPU)
    assert torch.equal(again.normal(1, 4, 4), first[1:])


@pytest.mark.parametrize(
    ("vote", "call"),
    [
        (Vote("estimate", 2**32, 0), 0),
        (Vote("estimate", -1, 0), 0),
        (Vote("estimate", 0, 2**40), 0),
        (Vote("estimate", 0, -1), 0),
        (Vote("estimate", 0, 0), 2**16),
        (Vote("estimate", 0, 0), -1),
    ],
)
def test_a_key_out_of_range_raises(vote: Vote, call: int) -> None:
    """Its bits would be another key's: draw 65,536 of vote 0 equals draw 0 of vote 1."""
    for draw in (Noise(0, "test").normals, Noise(0, "test").words):
        with pytest.raises(ValueError, match="noise key out of range"):
            draw([vote], 4, call)


def test_a_defense_that_draws_too_often_is_stopped_before_keys_meet() -> None:
    noise = Noise(0, "test")
    draw = VoteDraw(noise, [Vote("estimate", 0, 0)], 0.25, CPU)
    draw._calls = 2**16 - 2
    last = draw.normal(2)
    assert torch.equal(last, noise.normals([Vote("estimate/defense", 0, 0)], 2, 2**16 - 1))
    with pytest.raises(ValueError, match="noise key out of range"):
        draw.normal(2)


def test_the_largest_keys_have_their_own_noise() -> None:
    noise = Noise(0, "test")
    keys = [Vote("estimate", i, v) for i in (0, 2**16, 2**32 - 1) for v in (0, 1, 2**20, 2**40 - 1)]
    rows = [noise.normals([key], 8, call) for key in keys for call in (0, 1, 2**16 - 1)]
    assert len({row.numpy().tobytes() for row in rows}) == len(rows)


def test_training_noise_is_keyed_by_step() -> None:
    noise = Noise(0, "train")
    one, same, other = (TrainDraw(noise, step, 3, 0.5, CPU).normal(2, 2) for step in (4, 4, 5))
    assert one.shape == (3, 2, 2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
