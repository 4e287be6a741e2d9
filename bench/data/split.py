"""One split of a data set: its images and labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.pictures import Pictures


@dataclass(frozen=True)
class Split:
    """Images of one split: integers [N, C, H, W], in memory or decoded when asked for, and labels [N]."""

    name: str
    images: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64]
    levels: int
    found: str = ""  # where, and what was left out or reordered
    names: tuple[str, ...] = ()  # of the classes in the data, in the order of the labels; empty where it has none

    @property
    def origin(self) -> str:
        """Where the data were found, for the record, and what was left out, reordered or converted."""
        changes = self.images.changes() if isinstance(self.images, Pictures) else ""
        return "; ".join(filter(None, (self.found, changes)))

    def __len__(self) -> int:
        return len(self.labels)

    def integers(self, indices: Any = slice(None)) -> NDArray[np.uint8]:
        """Integers 0 .. levels-1 of the given rows, [len(indices), C, H, W]. Raises BenchError for a bad picture."""
        integers: NDArray[np.uint8] = self.images[indices]
        return integers

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """float32 pixels in [0, 1] of the given rows, [len(indices), C, H, W]. Raises BenchError for a bad picture."""
        pixels: NDArray[np.float32] = self.integers(indices).astype(np.float32) / np.float32(self.levels - 1)
        return pixels

    def sha256(self, indices: Any = None) -> str:
        """Hash of the given rows' images and labels: what a card declares is not proof of what was read.

        Of given rows it is the pixels' own hash, however they were stored. Of the whole split it is that
        of the encoded pictures where they are kept so (see ``Pictures.fingerprint``): nothing is decoded.
        """
        if indices is None and isinstance(self.images, Pictures):
            h = hashlib.sha256(self.images.fingerprint())
        else:
            h = hashlib.sha256(np.ascontiguousarray(self.integers(indices := _all(indices))).tobytes())
        h.update(self.labels[_all(indices)].astype("<i8").tobytes())
        return h.hexdigest()

    def first(self, count: int) -> Split:
        """The first ``count`` rows, or all of them for 0."""
        return self.select(slice(count)) if count else self

    def select(self, indices: Any) -> Split:
        """Those rows, nothing decoded."""
        images = self.images.select(indices) if isinstance(self.images, Pictures) else self.images[indices]
        return replace(self, images=images, labels=self.labels[indices])


def _all(indices: Any) -> Any:
    return slice(None) if indices is None else indices
