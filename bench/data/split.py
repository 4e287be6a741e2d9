"""One split of a data set: its images and labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.decoding import Crop
from bench.data.pictures import Pictures


@dataclass(frozen=True)
class Split:
    """One split: images as integers [N, C, H, W], in memory or decoded on access, and labels [N]."""

    name: str
    images: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64]
    levels: int
    found: str = ""  # where the data are, and what was left out or reordered
    names: tuple[str, ...] = ()  # names of the classes in the data, in the order of the labels; empty without names
    domains: NDArray[np.str_] | None = None  # where each row comes from, [N]; None: the data do not say

    @property
    def origin(self) -> str:
        """Where the data are, and what was left out, reordered or converted, for the record."""
        changes = self.images.changes() if isinstance(self.images, Pictures) else ""
        return "; ".join(filter(None, (self.found, changes)))

    def __len__(self) -> int:
        return len(self.labels)

    def integers(self, indices: Any = slice(None)) -> NDArray[np.uint8]:
        """Return integers 0 .. levels-1 of the given rows, [len(indices), C, H, W].

        Raises BenchError for an unreadable picture.
        """
        integers: NDArray[np.uint8] = self.images[indices]
        return integers

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """Return pixels in [0, 1] of the given rows, float32 [len(indices), C, H, W].

        Raises BenchError for an unreadable picture.
        """
        return self._scaled(self.integers(indices))

    def cropped(self, indices: Any, crops: Sequence[Crop]) -> NDArray[np.float32]:
        """Return pixels in [0, 1] of a box of each given row, cut out of the picture as stored and scaled.

        Raises BenchError for an unreadable picture.
        """
        assert isinstance(self.images, Pictures)  # as the card's schema demands of ``augment``
        return self._scaled(self.images.cropped(indices, crops))

    def _scaled(self, integers: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = integers.astype(np.float32) / np.float32(self.levels - 1)
        return pixels

    def sha256(self, indices: Any = None) -> str:
        """Hash images and labels, since a card does not prove what was read.

        With ``indices``, the hash is that of the pixels, however they are stored. For the complete split, encoded
        pictures are hashed without decoding them (see ``Pictures.fingerprint``).
        """
        if indices is None and isinstance(self.images, Pictures):
            h = hashlib.sha256(self.images.fingerprint())
        else:
            h = hashlib.sha256(np.ascontiguousarray(self.integers(indices := _all(indices))).tobytes())
        h.update(self.labels[_all(indices)].astype("<i8").tobytes())
        return h.hexdigest()

    def first(self, count: int) -> Split:
        """Select the first ``count`` rows; 0: all."""
        return self.select(slice(count)) if count else self

    def joined(self, other: Split) -> Split:
        """Append the rows of another split of the same source."""
        images: NDArray[np.uint8] | Pictures
        if isinstance(self.images, Pictures):
            assert isinstance(other.images, Pictures)
            images = self.images.joined(other.images)
        else:
            images = np.concatenate([self.images, other.images[:]])
        domains = None
        if self.domains is not None and other.domains is not None:
            domains = np.concatenate([self.domains, other.domains])
        labels = np.concatenate([self.labels, other.labels])
        return replace(self, images=images, labels=labels, domains=domains)

    def select(self, indices: Any) -> Split:
        """Select the given rows without decoding them."""
        images = self.images.select(indices) if isinstance(self.images, Pictures) else self.images[indices]
        domains = None if self.domains is None else self.domains[indices]
        return replace(self, images=images, labels=self.labels[indices], domains=domains)

    def domain_counts(self, indices: Any = None) -> dict[str, int]:
        """Count the given rows of each domain, the most frequent first; empty where the data have no domains."""
        found = [] if self.domains is None else self.domains[_all(indices)].tolist()
        return dict(Counter(found).most_common())


def _all(indices: Any) -> Any:
    return slice(None) if indices is None else indices
