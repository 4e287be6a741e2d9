"""Train the defenses of a command on the cluster, and open the run of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from bench.cluster.pool import LOSSES, When, WorkerPool, reason
from bench.cluster.run import ClusterRun, not_here
from bench.cluster.worker import Place, pack, prepare, unpack
from bench.data.datasets import load_split
from bench.errors import BenchError, DefenseFault
from bench.process.runlog import Reporter, RunLog, signature
from bench.records.record import Record, read_run
from bench.runs.plan import Plan
from bench.runs.prepared import RunHeader
from bench.runs.session import Session
from bench.runs.writer import RunWriter
from bench.smoothing.task import ImageCache

Prepared = Callable[[int, ClusterRun | Record | BenchError], None]  # number of the plan, and what became of it


class Preparations:
    """One Ray task for each plan: it trains the defense, or takes it from the cache."""

    def __init__(
        self, plans: Sequence[Plan], session: Session, reporter: Reporter, place: Place, pool: WorkerPool, when: When
    ) -> None:
        self._plans, self._session, self._reporter = plans, session, reporter
        self._place, self._pool, self._when = place, pool, when
        self.pending: set[int] = set()  # numbers of plans

    def start(self, then: Prepared) -> None:
        """Start all tasks; ``then`` gets the run to certify, the record if it is complete, or the error."""
        for number, plan in enumerate(self._plans):
            task = cast(Any, ray).remote(num_returns=2, max_retries=LOSSES, **self._pool.needs)(prepare)
            header, certifier = task.remote(self._place, pack(plan), self._session.out.resolve())
            self.pending.add(number)
            self._when(header, partial(self._finished, number, certifier, then))

    def _finished(self, number: int, certifier: Any, then: Prepared, future: Any) -> None:
        self.pending.discard(number)
        plan = self._plans[number]
        try:
            packed = future.result()
        except RayTaskError:
            raise
        except RayError as e:
            packed = DefenseFault(f"its training died: {reason(e)}", plan.defense)
            with closing(RunLog(self._session.log_file(plan))) as log:
                log.write(str(packed), logging.ERROR)
        if isinstance(packed, BenchError):
            then(number, packed)
            return
        header: RunHeader = unpack(packed)
        self._pool.check_versions(header.info.environment.as_json())
        then(number, self._open(number, header, certifier))

    def _open(self, number: int, header: RunHeader, certifier: Any) -> ClusterRun | Record:
        plan = self._plans[number]
        with ExitStack() as failed:
            log = failed.enter_context(closing(RunLog(self._session.log_file(plan))))
            log.write(signature())
            writer = failed.enter_context(closing(RunWriter(self._session.out, header, log, self._reporter)))
            if writer.complete:
                return read_run(writer.record.path)
            failed.pop_all()
        split, device = load_split(header.plan.card, header.info.identity.split), self._session.device
        task = header.task(split, device)
        # Put here, so that a node which is removed takes no copy with it that is needed.
        sent = ray.put(ray.get(certifier)), ray.put(pack(replace(task, images=not_here, labels=not_here)))
        return ClusterRun(
            number=number,
            defense=plan.defense,
            writer=writer,
            log=log,
            task=task,
            pixels=ImageCache(task),
            sent=sent,
            fresh=lambda audit: header.task(split, device, audit.noise),
        )
