"""Shards: each image is in exactly one of them."""

from __future__ import annotations

from bench.records.shards import Shard


def test_every_image_is_in_one_shard() -> None:
    for count, of in ((1, 1), (7, 3), (9, 9), (10, 4)):
        indices = list(range(100, 100 + count))
        parts = [Shard(i, of).part(indices) for i in range(1, of + 1)]
        assert sorted(i for part in parts for i in part) == indices
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
