"""The rows of a block of votes: which image each row shows, and the key of its noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.smoothing.noise import IMAGES, VOTES, Noise, Vote, to_device
from bench.smoothing.votes import Span

# Columns of the table: the place of the row's image among those at hand, the place of its purpose among ``purposes``,
# then its key as words of 32 bits: the image, the vote's lower 32 bits, the vote's upper 8.
AT, PURPOSE, IMAGE, VOTE, VOTE_HIGH = range(5)


class Rows:
    """Votes as rows of one int32 table, in host memory and on the device; iterates over the keys.

    An object a vote would cost more than a GPU's vote on a small image.
    """

    def __init__(self, purposes: tuple[str, ...], table: NDArray[np.int32], placed: Tensor) -> None:
        self.purposes, self.table, self.placed = purposes, table, placed

    @classmethod
    def of_spans(cls, spans: Sequence[Span], places: Mapping[int, int], device: torch.device) -> Rows:
        """Return the rows of spans in order; ``places``: where each image is among those at hand."""
        purposes = tuple(dict.fromkeys(s.purpose for s in spans))
        columns = [(places[s.image], purposes.index(s.purpose), s.image, s.first) for s in spans]
        counts = np.array([s.rows for s in spans])
        at, purpose, image, first = np.repeat(np.array(columns, np.int64), counts, axis=0).T
        vote = first + np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls._made(purposes, at, purpose, image, vote, device)

    @classmethod
    def of_votes(cls, votes: Sequence[Vote], at: Sequence[int], device: torch.device) -> Rows:
        """Return a row for each vote; ``at``: the place of its image among those at hand."""
        purposes = tuple(dict.fromkeys(v.purpose for v in votes))
        purpose, image, vote = np.array([(purposes.index(v.purpose), v.image, v.vote) for v in votes], np.int64).T
        return cls._made(purposes, np.array(at, np.int64), purpose, image, vote, device)

    @classmethod
    def _made(
        cls,
        purposes: tuple[str, ...],
        at: NDArray[np.int64],
        purpose: NDArray[np.int64],
        image: NDArray[np.int64],
        vote: NDArray[np.int64],
        device: torch.device,
    ) -> Rows:
        if min(image.min(), vote.min()) < 0 or image.max() >= IMAGES or vote.max() >= VOTES:
            raise ValueError(f"noise key out of range: images are below {IMAGES}, votes below {VOTES}")
        words = np.stack([at, purpose, image, vote & 0xFFFFFFFF, vote >> 32], axis=1)
        table = words.astype(np.uint32).view(np.int32)
        return cls(purposes, table, to_device(torch.from_numpy(table), device))

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Vote]:
        unsigned = self.table.view(np.uint32).tolist()
        return (Vote(self.purposes[p], image, high << 32 | low) for _, p, image, low, high in unsigned)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.purposes, self.table[rows], self.placed[rows])

    @property
    def at(self) -> Tensor:
        """The place of each row's image among those at hand, int32 on the device."""
        return self.placed[:, AT]

    def filled(self, rows: int) -> Rows:
        """Return as many ``rows``, those that are missing copies of the first."""
        missing = rows - len(self)
        if not missing:
            return self
        table = np.concatenate([self.table, np.repeat(self.table[:1], missing, axis=0)])
        return Rows(self.purposes, table, torch.cat([self.placed, self.placed[:1].expand(missing, -1)]))

    def rolled(self, count: int) -> Rows:
        """Return the rows with the first ``count`` moved to the end."""
        return Rows(self.purposes, np.roll(self.table, -count, axis=0), self.placed.roll(-count, 0))


Noisy = Callable[[Tensor, Rows], Tensor]  # images at hand [k, C, H, W] -> float32 noisy pixels of the rows, unclipped


def add_float(noise: Noise, sigma: float) -> Noisy:
    """Return the usual smoothing: float pixels plus float noise of ``sigma``, which is drawn on the CPU."""

    def noisy(images: Tensor, rows: Rows) -> Tensor:
        pixels = images.index_select(0, rows.at)
        normals = to_device(noise.normals(rows, pixels[0].numel()), pixels.device).view_as(pixels)
        return pixels.add_(normals, alpha=sigma)

    return noisy
