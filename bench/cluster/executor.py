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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from bench.cluster.pool import LOSSES, Actor, Crew, connected, pick_device, why
from bench.cluster.run import CERTIFY, CHECK, FINISH, Check, ClusterRun, not_here
from bench.cluster.worker import Place, pack, prepare, unpack
from bench.data.datasets import load_split
from bench.errors import BenchError, DefenseFault, one_line
from bench.models.served import is_url
from bench.plugins import sources
from bench.process.runlog import Reporter, RunLog, signature
from bench.records.record import Record, read_run
from bench.runs.certifier import Drifted, Filling, Ready
from bench.runs.identity import make_task
from bench.runs.plan import Plan
from bench.runs.recheck import fresh_noise
from bench.runs.session import Session
from bench.smoothing.dispatch import Dispatcher, enlarged
from bench.smoothing.engine import Pixels, Task
from bench.smoothing.noise import Noise
from bench.smoothing.scheduler import Batch

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
        self._runs: dict[int, ClusterRun] = {}
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
        self._crew.check_versions(ready.info.environment.as_json())
        with ExitStack() as failed:
            log = failed.enter_context(closing(RunLog(self._session.log_file(plan))))
            log.write(signature())
            filling = failed.enter_context(closing(Filling(self._session.out, ready, log, self._reporter)))
            if filling.complete:
                self._ended.append(read_run(filling.record.path))
                return
            failed.pop_all()
        split = load_split(ready.plan.card, ready.identity.split)

        def task(noise: Noise | None = None) -> Task:
            made = make_task(ready.plan, split, self._session.device, noise)
            return replace(made, block=ready.rows)

        # Put here, so that a node which is removed takes no copy with it that is needed.
        sent = ray.put(ray.get(certifier)), ray.put(pack(replace(task(), images=not_here, labels=not_here)))
        run = ClusterRun(
            number=number,
            defense=plan.defense,
            filling=filling,
            log=log,
            task=task(),
            pixels=Pixels(task()),
            sent=sent,
            fresh=lambda wanted: task(fresh_noise(wanted)),
        )
        self._runs[number] = run
        self._dispatcher.open(run.key, run.scheduler, *self._rows(run))
        if run.scheduler.done:  # certified before, and not checked
            self._certified(run)

    # Workers ------------------------------------------------------------------------------------------

    def _joined(self, actor: Actor) -> None:
        self._dispatcher.join(actor)
        self._resize()
        for run in list(self._runs.values()):
            self._check(run)

    def _left(self, actor: Actor) -> None:
        """What a worker had goes to others."""
        if actor not in self._dispatcher.workers:
            return
        for key, batch in self._dispatcher.leave(actor):
            if key // 2 in self._runs:
                self._runs[key // 2].losses[batch] += 1
        for number in actor.holds & set(self._runs):
            run = self._runs[number]
            lost = [check for by, check in run.checking if by is actor]
            run.checking = [(by, check) for by, check in run.checking if by is not actor]
            run.checks += lost
            run.losses[-1] += bool(lost)
            self._check(run)
            self._let_go(run, actor)

    def _resize(self) -> None:
        """Fit the batches to the number of workers."""
        for run in self._runs.values():
            if run.dispatched:
                self._dispatcher.resize(run.key, *self._rows(run))

    def _rows(self, run: ClusterRun) -> tuple[int, int]:
        """Votes of a batch, and how many are drawn at once.

        Enough to keep a worker busy, and to have no more answers a second than can be taken.
        """
        if run.measured is None:
            return run.task.block, run.task.block
        seconds = run.measured.block_seconds * run.measured.rows / run.task.block
        times = enlarged(len(self._dispatcher.workers), seconds)
        return run.measured.rows * times, run.measured.at_once * times

    # Votes --------------------------------------------------------------------------------------------

    def send(self, actor: Actor, key: int, batch: Batch) -> None:
        """Ask a worker for a batch; the first of a run comes after what it certifies."""
        run = self._runs[key // 2]
        self._hold(actor, run)
        images = {s.image: run.pixels[s.image] for s in batch.spans}
        actor.call(actor.handle.draw, run.number, batch, images, then=partial(self._answered, actor, key, batch))

    def _hold(self, actor: Actor, run: ClusterRun) -> None:
        """Send a worker what the run certifies, once."""
        if run.number in actor.holds:
            return
        actor.holds.add(run.number)
        run.machines[actor.here["device"]] += 1
        first = run.filling.first
        calibrate = not run.filling.resumed and run.measured is None
        load = (run.number, *run.sent, first, run.task.images([first])[0], calibrate)
        actor.call(actor.handle.load, *load, then=partial(self._loaded, actor, run.number))

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
        value = self._value(actor, number, future)
        if value is None:
            return
        run, (measured, fingerprint) = self._runs[number], value
        try:
            run.filling.same_function(fingerprint, f"the worker on {actor.node}")
            run.filling.note_workers(run.machines)
        except BenchError as e:
            self._fail(number, e)
            return
        if run.measured is None:
            run.measured = measured
            run.filling.announce(measured, max(1, len(self._dispatcher.workers)))
            self._resize()

    def _answered(self, actor: Actor, key: int, batch: Batch, future: Any) -> None:
        value = self._value(actor, key // 2, future)
        if value is None:
            self._dispatcher.free(actor, key, batch.number)
            return
        run, (voted, seconds) = self._runs[key // 2], value
        voted = voted.astype(np.int64)
        decided = self._dispatcher.answer(actor, key, batch.number, voted, seconds)
        if key != run.key or not run.dispatched:  # a copy, of what is decided
            return
        run.take(actor, batch, voted, decided)
        self._show()
        if run.scheduler.done:
            self._certified(run)

    def _certified(self, run: ClusterRun) -> None:
        """Nothing is left to draw in this phase."""
        self._dispatcher.close(run.key)
        if run.phase == CERTIFY:
            run.plan_checks()
            self._check(run)
            return
        try:
            run.redrawn([a for a in self._crew.actors if run.number in a.holds])
        except Drifted as e:
            self._fail(run.number, run.filling.refuse(e))
            return
        self._dispatcher.open(run.key, run.scheduler, *self._rows(run))
        if run.scheduler.done:
            self._certified(run)

    def _check(self, run: ClusterRun) -> None:
        """Ask workers for what is to be checked, each rather for another's work; once all is, let go of the run."""
        workers = cast(list[Actor], self._dispatcher.workers)
        if run.phase != CHECK or not workers:
            return
        for number, check in enumerate(run.checks):
            others = [w for w in workers if w is not check.by] or workers
            actor = others[number % len(others)]
            run.checking.append((actor, check))
            self._hold(actor, run)
            check.send(actor, partial(self._checked, actor, run.number, check))
        run.checks = []
        if not run.checking:
            run.phase = FINISH
            run.letting_go = {a for a in self._crew.actors if run.number in a.holds}
            for holder in run.letting_go:
                holder.call(holder.handle.finish, run.number, then=partial(self._dropped, holder, run.number))
            self._let_go(run, None)

    def _checked(self, actor: Actor, number: int, check: Check, future: Any) -> None:
        value = self._value(actor, number, future)
        if value is None:
            return
        run = self._runs[number]
        run.checking.remove((actor, check))
        try:
            check.judge(actor, value)
        except Drifted as e:
            self._fail(number, run.filling.refuse(e))
            return
        self._check(run)

    def _dropped(self, actor: Actor, number: int, future: Any) -> None:
        peak = self._value(actor, number, future)
        if peak is not None:
            self._runs[number].peak = max(self._runs[number].peak, peak)
            self._let_go(self._runs[number], actor)

    def _let_go(self, run: ClusterRun, actor: Actor | None) -> None:
        """A worker holds a run no more; the last ends it."""
        if run.phase != FINISH or run.number not in self._runs:
            return
        run.letting_go.discard(actor)
        if not run.letting_go:
            assert run.measured is not None
            run.filling.finish(run.measured, run.peak, dict(run.machines))
            run.close()
            del self._runs[run.number]
            self._ended.append(read_run(run.filling.record.path))

    def _fail(self, number: int, fault: BenchError) -> None:
        """Give up one run; the others go on. Raises what is no defense's fault, and so would stop them too."""
        run = self._runs.get(number)
        if run is not None:
            run.log.write(str(fault), logging.ERROR)
            run.close()
            del self._runs[number]
            if run.dispatched:
                self._dispatcher.close(run.key)
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
