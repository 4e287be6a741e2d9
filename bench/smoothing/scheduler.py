"""Which votes to draw next, and what those drawn have decided: bookkeeping without model, device or clock.

Each image is driven by a *procedure*: a generator that asks for votes and, once it has seen enough,
returns the decision. The scheduler packs the votes that any image still needs into batches. Several
may be out at once and come back in any order, twice or never: an image's votes are shown to its
procedure in the order of their numbers, each once, so its certificate is that of one batch at a time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.smoothing.procedures import Decision, Procedure, Votes

# Votes are placed in tiles: a vote's place within its tile is its number modulo TILE. Matrix kernels
# were measured to give a row other last bits at another alignment, so a freely moving row could
# change its vote with the packing. Sixteen float32 are one cache line, the widest alignment a kernel asks for.
TILE = 16

Voted = NDArray[np.int64]  # classes by row; NaN is a class of its own, the last


@dataclass(frozen=True)
class Certificate(Decision):
    """One image's line in the record; radius in l2 over pixels of [0, 1]."""

    index: int = -1
    label: int = -1
    seconds: float = 0.0


class Span(NamedTuple):
    """Rows of a batch: votes ``first`` and on, of one image and purpose, in whole tiles."""

    purpose: str
    image: int
    first: int
    rows: int


@dataclass(frozen=True)
class Batch:
    """Votes handed out together, and the number by which they are taken back."""

    number: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """How many votes are to be drawn."""
        return sum(s.rows for s in self.spans)


class _Image:
    """An image under way: its procedure, the votes it waits for, and those that came early."""

    def __init__(self, order: int, index: int, label: int, procedure: Procedure, classes: int) -> None:
        self.order, self.index, self.label = order, index, label
        self.seconds = 0.0
        self.stretch = 0  # how often the procedure went over to another purpose: votes of before are of no use
        self._procedure, self._width = procedure, classes + 1
        self._seen: dict[str, int] = {}  # votes of each purpose that the procedure was shown
        self.wanted: Votes | None = None
        self._expect(next(procedure))

    def _expect(self, wanted: Votes) -> None:
        seen = self._seen.get(wanted.purpose, 0)
        if self.wanted is None or wanted.purpose != self.wanted.purpose:
            self.stretch += 1
            self.placed = self._arrived = seen  # votes in some batch, and those back without a gap
            self._apart: dict[int, Voted] = {}  # those back beyond a gap, by the first one's number
            self._ahead: list[Voted] = []  # those back that the procedure has not asked for
        self.wanted, self.target = wanted, seen + wanted.count
        self._tally = np.zeros(self._width, np.int64)
        ahead, self._ahead, self._arrived = self._ahead, [], seen
        for voted in ahead:
            self._count(voted)

    def _count(self, voted: Voted) -> None:
        now = max(0, self.target - self._arrived)
        self._tally += np.bincount(voted[:now], minlength=self._width)
        if len(voted) > now:
            self._ahead.append(voted[now:])
        self._arrived += len(voted)

    @property
    def missing(self) -> int:
        """Votes that the procedure waits for and that are in no batch yet."""
        return max(0, self.target - self.placed)

    @property
    def later(self) -> int:
        """Votes in no batch yet that the procedure may ask for, those it waits for included."""
        assert self.wanted is not None
        return self.target + self.wanted.later - self.placed

    @property
    def bold(self) -> int:
        """Votes to draw ahead where nobody waits for any: until twice those that it will have seen are placed."""
        return min(self.later, 2 * self.target - self.placed)

    def put(self, first: int, voted: Voted) -> None:
        """Note what the votes numbered from ``first`` were for."""
        self._apart[first] = voted
        while (following := self._apart.pop(self._arrived, None)) is not None:
            self._count(following)

    def advance(self) -> Certificate | None:
        """Show the procedure what it waits for while that is there: its decision, None when it wants more votes."""
        assert self.wanted is not None
        while self._arrived >= self.target:
            self._seen[self.wanted.purpose] = self.target
            try:
                wanted = self._procedure.send(self._tally)
            except StopIteration as stop:
                decision: Decision = stop.value
                return Certificate(**vars(decision), index=self.index, label=self.label, seconds=self.seconds)
            self._expect(wanted)
        return None


class _Share(NamedTuple):
    """Rows of a batch that count for an image, whose votes number from ``first``."""

    image: _Image
    stretch: int
    first: int
    rows: slice


@dataclass
class _Out:
    """A batch handed out and not taken back."""

    batch: Batch
    shares: list[_Share]
    copied: bool = False


class Scheduler:
    """Packs the votes that images need into batches, in about the order of the images.

    ``start(label)`` makes the procedure of one image. Memory depends on the batches that are out, not on
    the votes or the number of images.
    """

    def __init__(
        self, start: Callable[[int], Procedure], labels: Callable[[int], int], classes: int, indices: Iterable[int]
    ) -> None:
        self._start, self._labels, self._classes = start, labels, classes
        self._waiting = deque(indices)
        self._open: dict[int, _Image] = {}
        self._hungry: list[tuple[int, _Image]] = []  # a heap, the image opened first on top: it misses votes
        self._out: dict[int, _Out] = {}
        self._lost: deque[int] = deque()
        self._opened, self._numbers = itertools.count(), itertools.count()

    @property
    def done(self) -> bool:
        """Whether every image is decided."""
        return not self._waiting and not self._open

    def next(self, rows: int, spare: bool = True, at_once: int | None = None) -> Batch | None:
        """At most ``rows`` votes to draw (a multiple of TILE), None where there are none.

        A batch that was lost comes first, as it was; then votes that images wait for; then new images. What room is
        left, up to a multiple of the votes that are drawn ``at_once`` (default: all), goes to votes that images may
        ask for later. ``spare``: so does a whole batch where nobody waits for votes, or else a copy of what is out
        longest, for somebody who would have nothing to do.
        """
        while self._lost:
            out = self._out.get(self._lost.popleft())
            if out is not None and self._useful(out):
                return out.batch
        packing = _Packing(rows)
        while packing.room and (image := self._hungriest()) is not None:
            packing.place(image, image.missing)
            if not image.missing:
                heapq.heappop(self._hungry)
        if packing.shares or spare:
            at_once = at_once or rows
            packing.room = min(packing.room, (packing.room - rows) % at_once if packing.shares else at_once)
            self._fill_ahead(packing)
        if not packing.shares:
            return self._copy() if spare else None
        batch = Batch(next(self._numbers), tuple(packing.spans))
        self._out[batch.number] = _Out(batch, packing.shares)
        return batch

    def _hungriest(self) -> _Image | None:
        """The image opened first of those that miss votes; a new one when every other has all of its own."""
        if not self._hungry:
            if not self._waiting:
                return None
            index = self._waiting.popleft()
            label = self._labels(index)
            image = _Image(next(self._opened), index, label, self._start(label), self._classes)
            self._open[index] = image
            heapq.heappush(self._hungry, (image.order, image))
        return self._hungry[0][1]

    def _fill_ahead(self, packing: _Packing) -> None:
        """Spend rows that would stay empty on votes which images under way may ask for later, shared out evenly."""
        if packing.room < TILE:
            return
        alone = not packing.shares
        hopeful = [(most, a) for a in self._open.values() if (most := a.bold if alone else a.later) > 0]
        most_images = packing.room // TILE
        if len(hopeful) > most_images:  # those with the least in hand
            hopeful = heapq.nsmallest(most_images, hopeful, key=lambda h: h[1].placed - h[1].target)
        for left, (most, image) in zip(range(len(hopeful), 0, -1), hopeful, strict=True):
            if share := packing.room // left // TILE * TILE:
                packing.place(image, min(share, most))

    def _copy(self) -> Batch | None:
        for out in self._out.values():
            if not out.copied and self._useful(out):
                out.copied = True
                return out.batch
        return None

    def _useful(self, out: _Out) -> bool:
        return any(s.image.index in self._open and s.stretch == s.image.stretch for s in out.shares)

    def take(self, number: int, voted: Voted, seconds: float) -> list[Certificate]:
        """Count a batch's votes, one class a row; returns what they decide. Of a second answer nothing is counted."""
        out = self._out.get(number)
        if out is None:
            return []
        if voted.shape != (out.batch.rows,):
            raise ValueError(f"{voted.shape} votes for a batch of {out.batch.rows}")
        del self._out[number]
        used = sum(s.rows.stop - s.rows.start for s in out.shares)
        for image, stretch, first, rows in out.shares:
            image.seconds += seconds * (rows.stop - rows.start) / used
            if stretch == image.stretch:
                image.put(first, voted[rows])
        decided = []
        for image in dict.fromkeys(s.image for s in out.shares):
            if image.index not in self._open:
                continue
            missed = image.missing
            certificate = image.advance()
            if certificate is not None:
                del self._open[image.index]
                decided.append(certificate)
            elif image.missing and not missed:
                heapq.heappush(self._hungry, (image.order, image))
        return decided

    def lose(self, number: int) -> None:
        """Have a batch handed out again, whose answer may never come; if it does come, the first counts."""
        self._lost.append(number)


class _Packing:
    """One batch being packed: its spans so far, and which of their rows count for whom."""

    def __init__(self, rows: int) -> None:
        self.spans: list[Span] = []
        self.shares: list[_Share] = []
        self.room = rows

    def place(self, image: _Image, most: int) -> None:
        """Add as many of the image's next votes as fit, up to ``most``, whole tiles at a time."""
        assert image.wanted is not None
        first = image.placed
        lead = first % TILE  # only after votes that ended within a tile
        count = min(most, self.room - lead)
        rows = -(-(lead + count) // TILE) * TILE
        begin = sum(s.rows for s in self.spans) + lead
        self.spans.append(Span(image.wanted.purpose, image.index, first - lead, rows))
        self.shares.append(_Share(image, image.stretch, first, slice(begin, begin + count)))
        image.placed += count
        self.room -= rows
