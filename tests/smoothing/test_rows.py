"""Rows hold the keys of their votes, as a list of votes would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.smoothing.noise import IMAGES, VOTES, Noise, Vote
from bench.smoothing.rows import Rows, add_float
from bench.smoothing.votes import Span

CPU = torch.device("cpu")
KEYS = st.builds(Vote, st.sampled_from(["select", "estimate"]), st.integers(0, IMAGES - 1), st.integers(0, VOTES - 1))


def test_rows_of_spans_number_the_votes_on() -> None:
    spans = [Span("estimate", 7, 2**32 - 1, 3), Span("select", 2**32 - 1, 0, 2), Span("estimate", 7, 5, 1)]
    rows = Rows.of_spans(spans, {7: 0, 2**32 - 1: 1}, CPU)
    expected = [Vote("estimate", 7, 2**32 - 1 + i) for i in range(3)]
    expected += [Vote("select", 2**32 - 1, 0), Vote("select", 2**32 - 1, 1), Vote("estimate", 7, 5)]
    assert list(rows) == expected and len(rows) == 6
    assert rows.at.tolist() == [0, 0, 0, 1, 1, 0]
    assert rows.placed.dtype == torch.int32 and rows.placed.tolist() == rows.table.tolist()


@given(votes=st.lists(KEYS, min_size=1, max_size=20), data=st.data())
def test_a_part_filled_or_rolled_has_the_keys_of_its_votes(votes: list[Vote], data: st.DataObject) -> None:
    rows = Rows.of_votes(votes, range(len(votes)), CPU)
    assert list(rows) == votes
    begin = data.draw(st.integers(0, len(votes) - 1))
    part, count = rows[begin : begin + 5], data.draw(st.integers(0, 3))
    filled, rolled = part.filled(len(part) + count), rows.rolled(begin)
    assert list(filled) == votes[begin : begin + 5] + [votes[begin]] * count
    assert list(rolled) == votes[begin:] + votes[:begin]
    for some in (part, filled, rolled):
        assert some.placed.tolist() == some.table.tolist()


@pytest.mark.parametrize(
    "span", [Span("x", -1, 0, 1), Span("x", IMAGES, 0, 1), Span("x", 0, -1, 2), Span("x", 0, VOTES - 1, 2)]
)
def test_a_key_out_of_range_is_refused(span: Span) -> None:
    """Its words would be those of another key."""
    with pytest.raises(ValueError, match="out of range"):
        Rows.of_spans([span], {span.image: 0}, CPU)


def test_float_noise_of_rows_is_that_of_their_votes() -> None:
    images = torch.from_numpy(np.random.default_rng(0).random((2, 1, 3, 3), np.float32))
    votes, at = [Vote("estimate", 4, 0), Vote("select", 9, 3), Vote("estimate", 4, 1)], [0, 1, 0]
    noise, before = Noise(0, "test"), images.clone()
    expected = images[at] + 0.25 * noise.normals(votes, 9).view(3, 1, 3, 3)
    assert torch.equal(add_float(noise, 0.25)(images, Rows.of_votes(votes, at, CPU)), expected)
    assert torch.equal(images, before)
