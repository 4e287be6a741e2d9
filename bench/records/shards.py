"""Shards of one run: ``--shard 2/4`` certifies every fourth image from the second on, in a folder of its own.

A shard's folder lies inside the run's folder, so that it is not mistaken for a run. Its identity is the whole run's:
only the images done differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError


@dataclass(frozen=True, order=True)
class Shard:
    """Shard ``number`` (from 1) of ``of``."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse ``i/k``. Raises BenchError unless 1 <= i <= k."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise BenchError(f"--shard {text}: write i/k, the i-th of k shards, with i from 1 to k")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """The name of its folder in the run's."""
        return f"shard-{self.number}-of-{self.of}"

    def part(self, indices: Sequence[int]) -> list[int]:
        """Return its images. Raises BenchError where a shard would have none."""
        if self.of > len(indices):
            raise BenchError(f"--shard {self}: more shards than images ({len(indices)}); use fewer")
        return list(indices[self.number - 1 :: self.of])


def shards_in(run: Path) -> dict[Shard, Path]:
    """Return the folders of shards in a run's folder, in order."""
    found = {}
    for file in run.glob("shard-*-of-*/run.json"):
        # No leading zeros, so that a shard has one name.
        numbers = re.fullmatch(r"shard-([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})", file.parent.name)
        if numbers and int(numbers[1]) <= int(numbers[2]):
            found[Shard(int(numbers[1]), int(numbers[2]))] = file.parent
    return dict(sorted(found.items()))
