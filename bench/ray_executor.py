"""``--executor ray``: the runs of one command share a Ray cluster.

This process trains nothing and draws no vote. It schedules, and is the only one that writes records.
A worker or a node may go at any moment: what it had is drawn elsewhere, from the same keys.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from bench.cards import load_split
from bench.certification import Drifted, Filling, Measured, Ready
from bench.certify import Pixels, Task
from bench.dispatch import Dispatcher, enlarged
from bench.errors import BenchError, DefenseFault, one_line
from bench.http_base import is_url
from bench.identity import make_task
from bench.plan import Plan
from bench.ray_crew import LOSSES, Actor, Crew, connected, pick_device, why
from bench.ray_worker import Place, pack, prepare, unpack
from bench.registry import sources
from bench.run import Session
from bench.runlog import Reporter, RunLog
from bench.scheduler import Batch, Scheduler
from bench.store import Record, read_run

LOOK = 2.0  # seconds between two looks at what the cluster has

_VARIABLES = ("CERTBENCH_CACHE", "CERTBENCH_DATA")  # absolute once they are sent


def run(
    plans: Sequence[Plan], out: Path, reporter: Reporter, device: str, address: str | None, timeout: float
) -> Iterator[Record | DefenseFault]:
    """Do all the runs, or what is left of them; yields the record of each, or its fault, as soon as it ended.

    Raises BenchError where something is missing that they all need.
    """
    if served := next((plan.base for plan in plans if is_url(plan.base)), None):
        raise BenchError(f"--executor ray: base {served} is served elsewhere, and asked by one process; leave it out")
    with connected(address):
        driver = _Driver(plans, out, reporter, pick_device(device), timeout)
        try:
            yield from driver.run()
        except KeyboardInterrupt:
            driver.note("interrupted", logging.INFO)
            raise
        except Exception as e:
            driver.note(str(e) if isinstance(e, BenchError) else one_line(e), logging.ERROR)
            raise
        finally:
            driver.close()


@dataclass
class _Run:
    """A run that is being certified."""

    filling: Filling
    log: RunLog
    scheduler: Scheduler
    task: Task
    pixels: Pixels
    sent: tuple[Any, Any]  # what certifies and the task, packed, in the object store
    measured: Measured | None = None
    peak: int = 0
    letting_go: set[Actor] | None = None  # once all is certified: workers that hold it still
    losses: Counter[int] = field(default_factory=Counter)  # workers that died with a batch
    machines: Counter[str] = field(default_factory=Counter)  # workers that held it, by their device's name

    def close(self) -> None:
        """Let another process write."""
        self.filling.close()
        self.log.close()


class _Driver:
    def __init__(
        self, plans: Sequence[Plan], out: Path, reporter: Reporter, device: torch.device, timeout: float
    ) -> None:
        self._plans, self._session, self._reporter = plans, Session(device, out, reporter), reporter
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        variables = {k: os.path.abspath(os.environ[k]) for k in _VARIABLES if os.environ.get(k)}
        plugins = sources(plan.defense for plan in plans)
        self._place = Place(os.getcwd(), variables, plugins, threads, device.type, timeout)
        self._crew = Crew(self._place, self.send, self._when, self._joined, self._left)
        self._back: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._preparing: set[int] = set()
        self._runs: dict[int, _Run] = {}
        self._ended: list[Record | DefenseFault] = []
        self._dispatcher = Dispatcher()
        self._bars, self._shown = ExitStack(), -1
        self._update: Callable[..., None] = print

    def run(self) -> Iterator[Record | DefenseFault]:
        """All runs, to their end."""
        for number, plan in enumerate(self._plans):
            task = cast(Any, ray).remote(num_returns=2, max_retries=LOSSES, **self._crew.needs)(prepare)
            ready, certifier = task.remote(self._place, pack(plan), self._session.out.resolve())
            self._preparing.add(number)
            self._when(ready, partial(self._prepared, number, certifier))
        looked = -LOOK
        while self._preparing or self._runs:
            if time.monotonic() - looked > LOOK:
                self._crew.look(len(self._preparing))
                looked = time.monotonic()
            self._dispatcher.fill()
            self._show()
            try:
                self._back.get(timeout=LOOK)()
            except queue.Empty:
                continue
            ended, self._ended = self._ended, []
            yield from ended

    def note(self, text: str, level: int) -> None:
        """Write what ends the command into the log of every run under way."""
        for run in self._runs.values():
            run.log.write(text, level)

    def close(self) -> None:
        """Let go of records and workers, finished or not."""
        self._bars.close()
        for run in self._runs.values():
            run.close()
        for actor in self._crew.actors:
            ray.kill(actor.handle)

    def _when(self, reference: Any, then: Callable[[Any], None]) -> None:
        """Have ``then`` called in the loop, with the future of what is waited for."""
        reference.future().add_done_callback(lambda future: self._back.put(lambda: then(future)))

    # Training -----------------------------------------------------------------------------------------

    def _prepared(self, number: int, certifier: Any, future: Any) -> None:
        self._preparing.discard(number)
        plan = self._plans[number]
        try:
            packed = future.result()
        except RayTaskError:
            raise
        except RayError as e:
            packed = DefenseFault(f"its training died: {why(e)}", plan.defense)
            with closing(RunLog(self._session.log_file(plan))) as log:
                log.write(str(packed), logging.ERROR)
        if isinstance(packed, BenchError):
            self._fail(number, packed)
            return
        ready: Ready = unpack(packed)
        self._crew.check_versions(ready.extra["environment"])
        with ExitStack() as failed:
            log = failed.enter_context(closing(RunLog(self._session.log_file(plan))))
            filling = failed.enter_context(closing(Filling(self._session.out, ready, log, self._reporter)))
            if filling.complete:
                self._ended.append(read_run(filling.record.path))
                return
            failed.pop_all()
        split = load_split(ready.plan.card, ready.identity["split"])
        task = replace(make_task(ready.plan, split, self._session.device), block=ready.identity["block"][0])
        scheduler = Scheduler(filling.start, task.labels, task.classes, filling.left)
        # Put here, so that a node which is removed takes no copy with it that is needed.
        sent = ray.put(ray.get(certifier)), ray.put(pack(replace(task, images=_not_here, labels=_not_here)))
        self._runs[number] = _Run(filling, log, scheduler, task, Pixels(task), sent)
        self._dispatcher.open(number, scheduler, *self._rows(self._runs[number]))

    # Workers ------------------------------------------------------------------------------------------

    def _joined(self, actor: Actor) -> None:
        self._dispatcher.join(actor)
        self._resize()

    def _left(self, actor: Actor) -> None:
        """What a worker had goes to others."""
        if actor not in self._dispatcher.workers:
            return
        for number, batch in self._dispatcher.leave(actor):
            if number in self._runs:
                self._runs[number].losses[batch] += 1
        for number in actor.holds & set(self._runs):
            self._let_go(number, actor)

    def _resize(self) -> None:
        """Fit the batches to the number of workers."""
        for number, run in self._runs.items():
            if run.letting_go is None:
                self._dispatcher.resize(number, *self._rows(run))

    def _rows(self, run: _Run) -> tuple[int, int]:
        """Votes of a batch, and how many are drawn at once.

        Enough to keep a worker busy, and to have no more answers a second than can be taken.
        """
        if run.measured is None:
            return run.task.block, run.task.block
        seconds = run.measured.block_seconds * run.measured.rows / run.task.block
        times = enlarged(len(self._dispatcher.workers), seconds)
        return run.measured.rows * times, run.measured.at_once * times

    # Votes --------------------------------------------------------------------------------------------

    def send(self, actor: Actor, number: int, batch: Batch) -> None:
        """Ask a worker for a batch; the first of a run comes after what it certifies."""
        run = self._runs[number]
        if number not in actor.holds:
            actor.holds.add(number)
            run.machines[actor.machine] += 1
            first, calibrate = batch.spans[0].image, not run.filling.resumed and run.measured is None
            load = (number, *run.sent, first, run.pixels[first], calibrate)
            actor.call(actor.handle.load, *load, then=partial(self._loaded, actor, number))
        images = {s.image: run.pixels[s.image] for s in batch.spans}
        answered = partial(self._answered, actor, number, batch.number)
        actor.call(actor.handle.draw, number, batch, images, then=answered)

    def _value(self, actor: Actor, number: int, future: Any) -> Any:
        """What a worker answered about a run, None where it is of no use: the worker died, or the run failed."""
        run = self._runs.get(number)
        silence = actor.answered()
        try:
            value = future.result()
        except RayTaskError:
            raise
        except RayError as e:
            self._crew.lose(actor)
            if run is None:
                return None
            run.log.write(f"a worker died, what it had is drawn again: {why(e)}", logging.WARNING)
            name = self._plans[number].defense
            if self._place.timeout and silence > self._place.timeout:
                self._fail(number, DefenseFault(f"no answer for {silence:.0f} s; {why(e)}", name))
            elif max(run.losses.values(), default=0) >= LOSSES:
                self._fail(number, DefenseFault(f"a batch took {LOSSES} workers with it: {why(e)}", name))
            return None
        if run and isinstance(value, BenchError):
            self._fail(number, run.filling.refuse(value) if isinstance(value, Drifted) else value)
            return None
        return value if run else None

    def _loaded(self, actor: Actor, number: int, future: Any) -> None:
        measured = self._value(actor, number, future)
        if measured is None:
            return
        run = self._runs[number]
        if run.measured is None:
            run.measured = measured
            run.filling.announce(measured, max(1, len(self._dispatcher.workers)))
            self._resize()

    def _answered(self, actor: Actor, number: int, batch: int, future: Any) -> None:
        value = self._value(actor, number, future)
        if value is None:
            self._dispatcher.free(actor, number, batch)
            return
        run, (voted, seconds) = self._runs[number], value
        for certificate in self._dispatcher.answer(actor, number, batch, voted.astype(np.int64), seconds):
            run.filling.add(certificate)
            run.pixels.pop(certificate.index, None)
            self._show()
        if run.scheduler.done and run.letting_go is None:
            self._dispatcher.close(number)
            run.letting_go = {a for a in self._crew.actors if number in a.holds}
            for holder in run.letting_go:
                holder.call(holder.handle.finish, number, then=partial(self._dropped, holder, number))
            self._let_go(number, None)

    def _dropped(self, actor: Actor, number: int, future: Any) -> None:
        peak = self._value(actor, number, future)
        if peak is not None:
            self._runs[number].peak = max(self._runs[number].peak, peak)
            self._let_go(number, actor)

    def _let_go(self, number: int, actor: Actor | None) -> None:
        """A worker holds a run no more; the last ends it."""
        run = self._runs[number]
        if run.letting_go is None:
            return
        run.letting_go.discard(actor)
        if not run.letting_go:
            assert run.measured is not None
            run.filling.finish(run.measured, run.peak, dict(run.machines))
            run.close()
            del self._runs[number]
            self._ended.append(read_run(run.filling.record.path))

    def _fail(self, number: int, fault: BenchError) -> None:
        """Give up one run; the others go on. Raises what is no defense's fault, and so would stop them too."""
        run = self._runs.get(number)
        if run is not None:
            run.log.write(str(fault), logging.ERROR)
            run.close()
            del self._runs[number]
            if run.letting_go is None:
                self._dispatcher.close(number)
            for actor in self._crew.actors:
                if number in actor.holds:
                    actor.handle.drop.remote(number)
        if not isinstance(fault, DefenseFault):
            raise fault
        self._ended.append(fault)

    # What a person sees -------------------------------------------------------------------------------

    def _show(self) -> None:
        """The progress of the first run that is not done; while there is none, that of the trainings."""
        first = min(self._runs, default=len(self._plans))
        if first != self._shown:
            self._bars.close()
            self._shown = first
            shown = (
                self._runs[first].filling.progress()
                if first in self._runs
                else self._reporter.training(f"{len(self._plans)} defenses on the cluster")
            )
            self._update = self._bars.enter_context(shown)
        if first in self._runs:
            self._update(*self._runs[first].filling.so_far)
        else:
            self._update(len(self._plans) - len(self._preparing), len(self._plans), math.nan)


def _not_here(*_: object) -> Any:
    raise AssertionError("a worker is sent its images")
