"""Encoded pictures, decoded on access."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.decoding import Crop, Decoded
from bench.errors import note

KEEP_BYTES = 1 << 30  # decoded pictures are kept up to this size (CIFAR-10: 0.2 GB), else decoded on every access


@dataclass(frozen=True)
class Pictures:
    """8-bit pictures [N, C, H, W], indexed like an array: ``pictures[indices]`` decodes those rows alone.

    ``rows`` are row numbers of the source; ``kept``, ``done``, ``changed`` and ``reported`` are shared by all
    selections of a source.
    """

    rows: NDArray[np.int64]
    shape: tuple[int, int, int]
    picture: Callable[[int, Crop | None], Decoded]
    stamp: Callable[[int], bytes | memoryview]
    resize: int
    kept: NDArray[np.uint8] | None
    done: NDArray[np.bool_]
    changed: dict[int, tuple[str, ...]]  # row -> the changes made by decoding
    reported: set[str]  # kinds of changes that were reported

    @classmethod
    def of(
        cls,
        count: int,
        shape: tuple[int, int, int],
        picture: Callable[[int, Crop | None], Decoded],
        stamp: Callable[[int], bytes | memoryview],
        resize: int,
    ) -> Pictures:
        """Make all ``count`` pictures of a source: ``picture`` decodes one, or a box of it; ``stamp`` identifies it."""
        # Pages that are never written take no memory, so decoding a few pictures of many costs little.
        kept = np.empty((count, *shape), np.uint8) if count * math.prod(shape) <= KEEP_BYTES else None
        return cls(np.arange(count), shape, picture, stamp, resize, kept, np.zeros(count, np.bool_), {}, set())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> NDArray[np.uint8]:
        rows = self.rows[indices]
        if self.kept is None:
            decoded = np.empty((len(rows), *self.shape), np.uint8)
            for at, row in enumerate(rows.tolist()):
                decoded[at] = self._decoded(row)
            return decoded
        for row in rows[~self.done[rows]].tolist():
            self.kept[row] = self._decoded(row)
            self.done[row] = True
        found: NDArray[np.uint8] = self.kept[rows]
        return found

    def cropped(self, indices: Any, crops: Sequence[Crop]) -> NDArray[np.uint8]:
        """Decode the given rows, a box of each as ``crops`` chooses, scaled to the shape."""
        pixels = [self._decoded(row, crop) for row, crop in zip(self.rows[indices].tolist(), crops, strict=True)]
        return np.stack(pixels)

    def select(self, indices: Any) -> Pictures:
        """Select the given rows without decoding them."""
        return replace(self, rows=self.rows[indices])

    def joined(self, other: Pictures) -> Pictures:
        """Append another selection of the same source."""
        assert other.done is self.done
        return replace(self, rows=np.concatenate([self.rows, other.rows]))

    def _decoded(self, row: int, crop: Crop | None = None) -> NDArray[np.uint8]:
        """Decode a picture, and report the first one of each kind of change."""
        decoded = self.picture(row, crop)
        if decoded.changes:
            self.changed[row] = decoded.changes
            for change in set(decoded.changes) - self.reported:
                self.reported.add(change)
                note(f"{decoded.where}: {change}; reported once, run.json counts such pictures")
        return decoded.pixels

    def changes(self) -> str:
        """Describe how many of these pictures each kind of change affects, as far as decoded; empty without any."""
        counted = Counter(change for row in self.rows.tolist() for change in self.changed.get(row, ()))
        return "; ".join(f"{count:,} of its pictures: {change}" for change, count in sorted(counted.items()))

    def fingerprint(self) -> bytes:
        """Hash these pictures without decoding them: the stamp of each, the shape and the resizing.

        The stamp of a picture in a parquet file is its encoded bytes; that of a file is its path, size and time of
        change. The same pixels stored in another way have another fingerprint, so weights are retrained rather than
        wrongly taken from the cache.
        """
        h = hashlib.sha256(f"{self.shape}|{self.resize}".encode())
        for row in self.rows.tolist():
            stamp = self.stamp(row)
            h.update(len(stamp).to_bytes(8, "little"))
            h.update(stamp)
        return h.digest()
