"""Certify the runs under way: send batches of votes to workers, take their answers, check and finish each run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from bench.cluster.pool import LOSSES, Actor, When, WorkerPool, reason
from bench.cluster.run import AUDIT, CERTIFY, CHECK, FINISH, Check, ClusterRun
from bench.cluster.worker import Place
from bench.errors import BenchError, DefenseFault
from bench.records.record import Record, read_run
from bench.runs.certifier import NotOneFunction
from bench.smoothing.dispatch import Dispatcher, batch_factor
from bench.smoothing.votes import Batch


class Voting:
    """The runs under way and the workers that vote for them."""

    def __init__(self, place: Place, when: When, ended: Callable[[int, Record | DefenseFault], None]) -> None:
        """Call ``ended`` with each run's number and its record, or the fault of its defense."""
        self.pool = WorkerPool(place, self._send, when, self._joined, self._left)
        self.runs: dict[int, ClusterRun] = {}  # by their numbers
        self._dispatcher, self._timeout, self._ended = Dispatcher(), place.timeout, ended

    def open(self, run: ClusterRun) -> None:
        """Certify a run from now on."""
        self.runs[run.number] = run
        self._dispatcher.open(run.key, run.scheduler, *self._rows(run))
        if run.scheduler.done:  # certified before, and not checked
            self._certified(run)

    def fill(self) -> None:
        """Send batches to the workers that have time for them."""
        self._dispatcher.fill()

    def fail(self, number: int, fault: BenchError) -> None:
        """Give up one run; the others go on. Raises an error that is no defense's fault: it would stop them too."""
        run = self.runs.get(number)
        if run is not None:
            run.log.write(str(fault), logging.ERROR)
            run.close()
            del self.runs[number]
            if run.dispatched:
                self._dispatcher.close(run.key)
            for actor in self.pool.actors:
                if number in actor.holds:
                    actor.handle.drop.remote(number)
        if not isinstance(fault, DefenseFault):
            raise fault
        self._ended(number, fault)

    def close(self) -> None:
        """Release records and workers."""
        for run in self.runs.values():
            run.close()
        for actor in self.pool.actors:
            ray.kill(actor.handle)

    # Workers ------------------------------------------------------------------------------------------

    def _joined(self, actor: Actor) -> None:
        self._dispatcher.join(actor)
        self._resize()
        for run in list(self.runs.values()):
            self._check(run)

    def _left(self, actor: Actor) -> None:
        """Give the batches and checks of a lost worker to others."""
        if actor not in self._dispatcher.workers:
            return
        for key, batch in self._dispatcher.leave(actor):
            if key // 2 in self.runs:
                self.runs[key // 2].losses[batch] += 1
        for number in actor.holds & set(self.runs):
            run = self.runs[number]
            lost = [check for by, check in run.checking if by is actor]
            run.checking = [(by, check) for by, check in run.checking if by is not actor]
            run.checks += lost
            run.losses[-1] += bool(lost)
            self._check(run)
            self._released(run, actor)

    def _resize(self) -> None:
        """Fit the batches to the number of workers."""
        for run in self.runs.values():
            if run.dispatched:
                self._dispatcher.resize(run.key, *self._rows(run))

    def _rows(self, run: ClusterRun) -> tuple[int, int]:
        """Votes of a batch, and the number drawn at once.

        Enough to keep a worker busy, and to have no more answers a second than this process can take.
        """
        if run.measured is None:
            return run.task.block, run.task.block
        seconds = run.measured.block_seconds * run.measured.rows / run.task.block
        times = batch_factor(len(self._dispatcher.workers), seconds)
        return run.measured.rows * times, run.measured.at_once * times

    # Votes --------------------------------------------------------------------------------------------

    def _send(self, actor: Actor, key: int, batch: Batch) -> None:
        """Ask a worker for a batch; before the first batch of a run it gets the run's certifier."""
        run = self.runs[key // 2]
        self._load(actor, run)
        images = run.pixels.get(s.image for s in batch.spans)
        actor.call(actor.handle.draw, run.number, batch, images, then=partial(self._answered, actor, key, batch))

    def _load(self, actor: Actor, run: ClusterRun) -> None:
        """Send a worker the run's certifier, once."""
        if run.number in actor.holds:
            return
        actor.holds.add(run.number)
        run.machines[actor.here["device"]] += 1
        first = run.writer.first
        calibrate = not run.writer.resumed and run.measured is None
        load = (run.number, *run.sent, first, run.task.images([first])[0], calibrate)
        actor.call(actor.handle.load, *load, then=partial(self._loaded, actor, run.number))

    def _value(self, actor: Actor, number: int, future: Any) -> Any:
        """Return a worker's answer about a run, None where it is of no use: the worker died, or the run failed."""
        run = self.runs.get(number)
        silence = actor.answered()
        try:
            value = future.result()
        except RayTaskError:
            raise
        except RayError as e:
            if run is not None:
                run.log.write(f"a worker died, its batches are drawn again: {reason(e)}", logging.WARNING)
            self.pool.lose(actor)
            if run is None or number not in self.runs:  # the worker was the last to finish the run
                return None
            if self._timeout and silence > self._timeout:
                self.fail(number, DefenseFault(f"no answer for {silence:.0f} s; {reason(e)}", run.defense))
            elif max(run.losses.values(), default=0) >= LOSSES:
                self.fail(number, DefenseFault(f"a batch took {LOSSES} workers with it: {reason(e)}", run.defense))
            return None
        if run and isinstance(value, BenchError):
            self.fail(number, run.writer.refuse(value) if isinstance(value, NotOneFunction) else value)
            return None
        return value if run else None

    def _loaded(self, actor: Actor, number: int, future: Any) -> None:
        value = self._value(actor, number, future)
        if value is None:
            return
        run, (measured, fingerprint) = self.runs[number], value
        try:
            run.writer.check_same_function(fingerprint, f"the worker on {actor.node}")
            run.writer.note_workers(run.machines)
        except BenchError as e:
            self.fail(number, e)
            return
        if run.measured is None:
            run.measured = measured
            run.writer.announce(measured, max(1, len(self._dispatcher.workers)))
            self._resize()

    def _answered(self, actor: Actor, key: int, batch: Batch, future: Any) -> None:
        value = self._value(actor, key // 2, future)
        if value is None:
            self._dispatcher.free(actor, key, batch.number)
            return
        run, (voted, seconds) = self.runs[key // 2], value
        voted = voted.astype(np.int64)
        decided = self._dispatcher.answer(actor, key, batch.number, voted, seconds)
        if key != run.key or not run.dispatched:  # a duplicate, of images that are decided
            return
        run.take(actor, batch, voted, decided)
        if run.scheduler.done:
            self._certified(run)

    # Checks -------------------------------------------------------------------------------------------

    def _certified(self, run: ClusterRun) -> None:
        """Go on to a run's next phase once nothing is left to draw."""
        self._dispatcher.close(run.key)
        if run.phase == CERTIFY:
            run.plan_checks()
            self._check(run)
            return
        try:
            run.redrawn([a for a in self.pool.actors if run.number in a.holds])
        except NotOneFunction as e:
            self.fail(run.number, run.writer.refuse(e))
            return
        self._dispatcher.open(run.key, run.scheduler, *self._rows(run))
        if run.scheduler.done:
            self._certified(run)

    def _check(self, run: ClusterRun) -> None:
        """Send the checks of a run, preferably not to the worker whose votes are checked; then finish the run."""
        workers = cast(list[Actor], self._dispatcher.workers)
        if run.phase not in (CHECK, AUDIT) or not workers:
            return
        for number, check in enumerate(run.checks):
            others = [w for w in workers if w is not check.by] or workers
            actor = others[number % len(others)]
            run.checking.append((actor, check))
            self._load(actor, run)
            check.send(actor, partial(self._checked, actor, run.number, check))
        run.checks = []
        if run.checking:
            return
        if run.phase == CHECK:
            run.plan_audit()
            self._check(run)
            return
        run.phase = FINISH
        run.holders = {a for a in self.pool.actors if run.number in a.holds}
        for holder in run.holders:
            holder.call(holder.handle.finish, run.number, then=partial(self._finished, holder, run.number))
        self._released(run, None)

    def _checked(self, actor: Actor, number: int, check: Check, future: Any) -> None:
        value = self._value(actor, number, future)
        if value is None:
            return
        run = self.runs[number]
        run.checking.remove((actor, check))
        try:
            check.judge(actor, value)
        except NotOneFunction as e:
            self.fail(number, run.writer.refuse(e))
            return
        self._check(run)

    def _finished(self, actor: Actor, number: int, future: Any) -> None:
        peak = self._value(actor, number, future)
        if peak is not None:
            self.runs[number].peak = max(self.runs[number].peak, peak)
            self._released(self.runs[number], actor)

    def _released(self, run: ClusterRun, actor: Actor | None) -> None:
        """Note that a worker no longer holds a run; the last one completes it."""
        if run.phase != FINISH or run.number not in self.runs:
            return
        run.holders.discard(actor)
        if not run.holders:
            assert run.measured is not None
            run.writer.finish(run.measured, run.peak, dict(run.machines))
            run.close()
            del self.runs[run.number]
            self._ended(run.number, read_run(run.writer.record.path))
