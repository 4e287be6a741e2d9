"""The scheduler: chooses the votes to draw next and gives them to the procedures, without model, device or clock.

Each image has a procedure that requests votes until it decides. The scheduler packs the votes that images still need
into batches. Several batches may be in flight at once, and be answered in any order, twice or never: a procedure gets
its image's votes in the order of their numbers, each once, so certificates are those of one batch at a time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.smoothing.votes import TILE, Batch, Certificate, Decision, ImageProcedure, Span, Voted, VoteRequest


class _Image:
    """An image being certified: its procedure, and its votes that are requested, packed or received."""

    def __init__(self, order: int, index: int, label: int, procedure: ImageProcedure, classes: int) -> None:
        self.order, self.index, self.label = order, index, label
        self.seconds = 0.0
        self.phase = 0  # changes with the purpose of the requests: votes of earlier phases are ignored
        self._procedure, self._width = procedure, classes + 1
        self._seen: dict[str, int] = {}  # votes of each purpose that the procedure has counted
        self.request = procedure.first()
        self._start_phase(self.request.purpose)
        self._expect(self.request)

    def _start_phase(self, purpose: str) -> None:
        self.phase += 1
        self.packed = self._seen.get(purpose, 0)  # votes in some batch
        self._received = self.packed  # votes received without a gap
        self._beyond_gap: dict[int, Voted] = {}  # votes received beyond a gap, by the number of the first
        self._early: list[Voted] = []  # votes received but not yet requested

    def _expect(self, request: VoteRequest) -> None:
        if request.purpose != self.request.purpose:
            self._start_phase(request.purpose)
        self.request = request
        seen = self._seen.get(request.purpose, 0)
        self.target = seen + request.count  # votes counted once the request is met
        self._counts = np.zeros(self._width, np.int64)
        early, self._early, self._received = self._early, [], seen
        for voted in early:
            self._count(voted)

    def _count(self, voted: Voted) -> None:
        now = max(0, self.target - self._received)
        self._counts += np.bincount(voted[:now], minlength=self._width)
        if len(voted) > now:
            self._early.append(voted[now:])
        self._received += len(voted)

    @property
    def missing(self) -> int:
        """Requested votes that are in no batch yet."""
        return max(0, self.target - self.packed)

    @property
    def useful(self) -> int:
        """Votes in no batch yet that are requested or may be requested later."""
        return self.target + self.request.later - self.packed

    @property
    def speculative(self) -> int:
        """Votes to draw speculatively when idle: until twice the votes of the request are packed."""
        return min(self.useful, 2 * self.target - self.packed)

    def receive(self, first: int, voted: Voted) -> None:
        """Take the votes numbered from ``first``."""
        self._beyond_gap[first] = voted
        while (following := self._beyond_gap.pop(self._received, None)) is not None:
            self._count(following)

    def advance(self) -> Certificate | None:
        """Give the procedure the requested votes once they are there; return the certificate if it decides."""
        while self._received >= self.target:
            self._seen[self.request.purpose] = self.target
            answer = self._procedure.update(self._counts)
            if isinstance(answer, Decision):
                return Certificate(**vars(answer), index=self.index, label=self.label, seconds=self.seconds)
            self._expect(answer)
        return None


class _Share(NamedTuple):
    """Rows of a batch that count for an image, whose votes are numbered from ``first``."""

    image: _Image
    phase: int
    first: int
    rows: slice


@dataclass
class _InFlight:
    """A batch that is handed out and not answered."""

    batch: Batch
    shares: list[_Share]
    duplicated: bool = False


class Scheduler:
    """Packs the votes that images need into batches, in about the order of the images.

    ``start(label)`` starts the procedure for one image. Memory depends on the batches in flight, not on the number of
    votes or images.
    """

    def __init__(
        self,
        start: Callable[[int], ImageProcedure],
        labels: Callable[[int], int],
        classes: int,
        indices: Iterable[int],
    ) -> None:
        self._start, self._labels, self._classes = start, labels, classes
        self._pending = deque(indices)
        self._started: dict[int, _Image] = {}
        self._waiting: list[tuple[int, _Image]] = []  # a heap of images with missing votes, the oldest on top
        self._in_flight: dict[int, _InFlight] = {}
        self._to_retry: deque[int] = deque()
        self._orders, self._numbers = itertools.count(), itertools.count()

    @property
    def done(self) -> bool:
        """Whether every image is decided."""
        return not self._pending and not self._started

    def next_batch(self, rows: int, speculate: bool = True, at_once: int | None = None) -> Batch | None:
        """Return a batch of at most ``rows`` votes, None if there is nothing to draw.

        A lost batch comes first, unchanged; then votes that images wait for; then new images. Rows left over, up to a
        multiple of ``at_once``, go to votes that images may request later.

        Args:
            rows: a multiple of TILE.
            speculate: if no image waits for votes, fill a batch with votes that images may request later, or else
                duplicate the oldest batch in flight.
            at_once: votes that a worker draws at the same time (default: all ``rows``).
        """
        while self._to_retry:
            lost = self._in_flight.get(self._to_retry.popleft())
            if lost is not None and self._needed(lost):
                return lost.batch
        packing = _Packing(rows)
        while packing.room and (image := self._first_waiting()) is not None:
            packing.add(image, image.missing)
            if not image.missing:
                heapq.heappop(self._waiting)
        if packing.shares or speculate:
            at_once = at_once or rows
            packing.room = min(packing.room, (packing.room - rows) % at_once if packing.shares else at_once)
            self._add_speculative(packing)
        if not packing.shares:
            return self._duplicate() if speculate else None
        batch = Batch(next(self._numbers), tuple(packing.spans))
        self._in_flight[batch.number] = _InFlight(batch, packing.shares)
        return batch

    def _first_waiting(self) -> _Image | None:
        """Return the oldest image with missing votes; start a new image if there is none."""
        if not self._waiting:
            if not self._pending:
                return None
            index = self._pending.popleft()
            label = self._labels(index)
            image = _Image(next(self._orders), index, label, self._start(label), self._classes)
            self._started[index] = image
            heapq.heappush(self._waiting, (image.order, image))
        return self._waiting[0][1]

    def _add_speculative(self, packing: _Packing) -> None:
        """Share the rows left over among images that may request more votes later."""
        if packing.room < TILE:
            return
        idle = not packing.shares
        hopeful = [(most, i) for i in self._started.values() if (most := i.speculative if idle else i.useful) > 0]
        most_images = packing.room // TILE
        if len(hopeful) > most_images:  # those with the fewest votes in advance
            hopeful = heapq.nsmallest(most_images, hopeful, key=lambda h: h[1].packed - h[1].target)
        for left, (most, image) in zip(range(len(hopeful), 0, -1), hopeful, strict=True):
            if share := packing.room // left // TILE * TILE:
                packing.add(image, min(share, most))

    def _duplicate(self) -> Batch | None:
        for entry in self._in_flight.values():
            if not entry.duplicated and self._needed(entry):
                entry.duplicated = True
                return entry.batch
        return None

    def _needed(self, entry: _InFlight) -> bool:
        return any(s.image.index in self._started and s.phase == s.image.phase for s in entry.shares)

    def receive(self, number: int, voted: Voted, seconds: float) -> list[Certificate]:
        """Count a batch's votes, one class a row, and return the certificates they decide.

        A second answer to the same batch is ignored.
        """
        entry = self._in_flight.get(number)
        if entry is None:
            return []
        if voted.shape != (entry.batch.rows,):
            raise ValueError(f"{voted.shape} votes for a batch of {entry.batch.rows}")
        del self._in_flight[number]
        used = sum(s.rows.stop - s.rows.start for s in entry.shares)
        for image, phase, first, rows in entry.shares:
            image.seconds += seconds * (rows.stop - rows.start) / used
            if phase == image.phase:
                image.receive(first, voted[rows])
        decided = []
        for image in dict.fromkeys(s.image for s in entry.shares):
            if image.index not in self._started:
                continue
            missed = image.missing
            certificate = image.advance()
            if certificate is not None:
                del self._started[image.index]
                decided.append(certificate)
            elif image.missing and not missed:
                heapq.heappush(self._waiting, (image.order, image))
        return decided

    def retry(self, number: int) -> None:
        """Hand out a batch again because its answer may never come; the first answer counts."""
        self._to_retry.append(number)


class _Packing:
    """A batch being packed: its spans so far, and the rows that count for each image."""

    def __init__(self, rows: int) -> None:
        self.spans: list[Span] = []
        self.shares: list[_Share] = []
        self.room = rows

    def add(self, image: _Image, most: int) -> None:
        """Add as many of the image's next votes as fit, up to ``most``, in whole tiles."""
        first = image.packed
        lead = first % TILE  # only after votes that ended within a tile
        count = min(most, self.room - lead)
        rows = -(-(lead + count) // TILE) * TILE
        begin = sum(s.rows for s in self.spans) + lead
        self.spans.append(Span(image.request.purpose, image.index, first - lead, rows))
        self.shares.append(_Share(image, image.phase, first, slice(begin, begin + count)))
        image.packed += count
        self.room -= rows
