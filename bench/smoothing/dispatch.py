"""Which worker draws what: several certifications share several workers, without a barrier between images or runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from bench.smoothing.scheduler import Batch, Certificate, Scheduler, Voted

MESSAGES = 300  # batches a second that one process asks for at most: with more workers, larger batches


def enlarged(workers: int, batch_seconds: float) -> int:
    """By how much batches are enlarged, so that ``workers`` send back no more than ``MESSAGES`` of them a second."""
    return max(1, math.ceil(workers / (MESSAGES * batch_seconds)))


class Worker(Hashable, Protocol):
    """Somebody who draws batches of votes, one after the other, and whose answers come to ``Dispatcher.answer``."""

    def send(self, run: int, batch: Batch) -> None:
        """Ask for a batch of a run; returns at once."""
        ...


@dataclass
class _Run:
    scheduler: Scheduler
    rows: int
    at_once: int | None


class Dispatcher:
    """Keeps every worker busy: one batch under way and the next already with it.

    Earlier runs come first; later ones fill what they leave. A second batch holds votes that somebody
    waits for; only a worker with nothing to do draws ahead, or draws again what another is long about.
    """

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._with: dict[Worker, Counter[tuple[int, int]]] = {}  # (run, number) of each one's batches
        self._free: tuple[dict[Worker, None], dict[Worker, None]] = ({}, {})  # workers with none, and with one

    def open(self, run: int, scheduler: Scheduler, rows: int, at_once: int | None = None) -> None:
        """Share out a run from now on, in batches of ``rows`` votes, so many drawn ``at_once`` (default: all).

        Runs are served in the order of their numbers.
        """
        self._runs[run] = _Run(scheduler, rows, at_once)
        self._runs = dict(sorted(self._runs.items()))

    def close(self, run: int) -> None:
        """Share out a run no more; answers still to come are of no use."""
        del self._runs[run]

    def resize(self, run: int, rows: int, at_once: int) -> None:
        """Share out a run in batches of ``rows`` votes from now on, so many drawn ``at_once``."""
        self._runs[run].rows, self._runs[run].at_once = rows, at_once

    def join(self, worker: Worker) -> None:
        """Give a worker batches from now on."""
        self._with[worker] = Counter()
        self._free[0][worker] = None

    def leave(self, worker: Worker) -> Counter[tuple[int, int]]:
        """Give a worker no more; what it had, returned as (run, number), is handed out again."""
        had = self._with.pop(worker)
        for free in self._free:
            free.pop(worker, None)
        for run, number in had:
            if run in self._runs:
                self._runs[run].scheduler.lose(number)
        return had

    @property
    def workers(self) -> list[Worker]:
        """All that joined and did not leave."""
        return list(self._with)

    def fill(self) -> None:
        """Send what is to be drawn to those who have time for it, those with nothing to do first."""
        for has, free in enumerate(self._free):
            while free and (found := self._next(spare=not has)) is not None:
                worker, (run, batch) = next(iter(free)), found
                del free[worker]
                self._with[worker][run, batch.number] += 1
                if not has:
                    self._free[1][worker] = None
                worker.send(run, batch)

    def _next(self, spare: bool) -> tuple[int, Batch] | None:
        for bold in (False, True)[: 1 + spare]:
            for number, run in self._runs.items():
                if (batch := run.scheduler.next(run.rows, bold, run.at_once)) is not None:
                    return number, batch
        return None

    def answer(self, worker: Worker, run: int, number: int, voted: Voted, seconds: float) -> list[Certificate]:
        """Count what a worker sends back; returns the images that are decided by it."""
        self.free(worker, run, number)
        return self._runs[run].scheduler.take(number, voted, seconds) if run in self._runs else []

    def free(self, worker: Worker, run: int, number: int) -> None:
        """Note that a worker is done with a batch. One that has left may still answer."""
        had = self._with.get(worker)
        if had is None:
            return
        had -= Counter([(run, number)])
        for free in self._free:
            free.pop(worker, None)
        if had.total() < len(self._free):
            self._free[had.total()][worker] = None
