"""Batches for workers: several runs share a pool of workers, with no barrier between images or runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from bench.smoothing.scheduler import Scheduler
from bench.smoothing.votes import Batch, Certificate, Voted

ANSWERS = 300  # batches a second that one process receives at most; more workers get larger batches


def batch_factor(workers: int, batch_seconds: float) -> int:
    """Return the factor by which to enlarge batches, so that ``workers`` send at most ``ANSWERS`` a second."""
    return max(1, math.ceil(workers / (ANSWERS * batch_seconds)))


class Worker(Hashable, Protocol):
    """Draws batches of votes, one after the other; each answer is passed to ``Dispatcher.answer``."""

    def send(self, run: int, batch: Batch) -> None:
        """Request a batch of a run; returns at once."""
        ...


@dataclass
class _Run:
    scheduler: Scheduler
    rows: int
    at_once: int | None


class Dispatcher:
    """Keeps every worker busy: it draws one batch and already has the next.

    Earlier runs come first; later ones get the workers that are left. A second batch holds only votes that images
    wait for. Only idle workers draw speculatively or duplicate slow batches.
    """

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._assigned: dict[Worker, Counter[tuple[int, int]]] = {}  # (run, number) of each worker's batches
        # Workers with room for a batch, in the order in which they get one (a dict is an ordered set).
        self._idle: dict[Worker, None] = {}
        self._with_one_batch: dict[Worker, None] = {}

    def open(self, run: int, scheduler: Scheduler, rows: int, at_once: int | None = None) -> None:
        """Start to hand out a run, in batches of ``rows`` votes; workers draw ``at_once`` of them (default: all).

        Runs are served in the order of their numbers.
        """
        self._runs[run] = _Run(scheduler, rows, at_once)
        self._runs = dict(sorted(self._runs.items()))

    def close(self, run: int) -> None:
        """Stop handing out a run; later answers for it are ignored."""
        del self._runs[run]

    def resize(self, run: int, rows: int, at_once: int) -> None:
        """Change the size of a run's batches to ``rows`` votes, of which workers draw ``at_once``."""
        self._runs[run].rows, self._runs[run].at_once = rows, at_once

    def join(self, worker: Worker) -> None:
        """Add a worker to the pool."""
        self._assigned[worker] = Counter()
        self._idle[worker] = None

    def leave(self, worker: Worker) -> Counter[tuple[int, int]]:
        """Remove a worker from the pool; its batches, returned as (run, number), are handed out again."""
        batches = self._assigned.pop(worker)
        self._idle.pop(worker, None)
        self._with_one_batch.pop(worker, None)
        for run, number in batches:
            if run in self._runs:
                self._runs[run].scheduler.retry(number)
        return batches

    @property
    def workers(self) -> list[Worker]:
        """All workers of the pool."""
        return list(self._assigned)

    def fill(self) -> None:
        """Send batches to the workers that have room for one, idle workers first."""
        while self._idle and (found := self._next_batch(speculate=True)) is not None:
            worker = next(iter(self._idle))
            del self._idle[worker]
            self._with_one_batch[worker] = None
            self._send(worker, *found)
        while self._with_one_batch and (found := self._next_batch(speculate=False)) is not None:
            worker = next(iter(self._with_one_batch))
            del self._with_one_batch[worker]
            self._send(worker, *found)

    def _send(self, worker: Worker, run: int, batch: Batch) -> None:
        self._assigned[worker][run, batch.number] += 1
        worker.send(run, batch)

    def _next_batch(self, speculate: bool) -> tuple[int, Batch] | None:
        """Return a batch and its run: votes that images wait for, else (with ``speculate``) speculative ones."""
        found = self._first_batch(speculate=False)
        return self._first_batch(speculate=True) if found is None and speculate else found

    def _first_batch(self, speculate: bool) -> tuple[int, Batch] | None:
        for number, run in self._runs.items():
            if (batch := run.scheduler.next_batch(run.rows, speculate, run.at_once)) is not None:
                return number, batch
        return None

    def answer(self, worker: Worker, run: int, number: int, voted: Voted, seconds: float) -> list[Certificate]:
        """Count a worker's answer, and return the certificates that it decides."""
        self.free(worker, run, number)
        return self._runs[run].scheduler.receive(number, voted, seconds) if run in self._runs else []

    def free(self, worker: Worker, run: int, number: int) -> None:
        """Note that a worker finished a batch. Workers that left may still answer."""
        batches = self._assigned.get(worker)
        if batches is None:
            return
        batches -= Counter([(run, number)])
        self._idle.pop(worker, None)
        self._with_one_batch.pop(worker, None)
        if batches.total() == 0:
            self._idle[worker] = None
        elif batches.total() == 1:
            self._with_one_batch[worker] = None
