"""One run on a cluster: its phases, and the votes of its workers that are drawn again before it is complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

from bench.cluster.pool import Actor
from bench.cluster.worker import pack
from bench.process.runlog import RunLog
from bench.runs.certifier import NotOneFunction
from bench.runs.costs import Measured
from bench.runs.fresh_noise import Audit, BatchSample
from bench.runs.writer import RunWriter
from bench.smoothing.scheduler import Scheduler
from bench.smoothing.task import ImageCache, Task
from bench.smoothing.votes import Batch, Certificate, Voted

# Phases. A resumed run first certifies some images again; a certified run is checked, then released by its workers.
REDRAW, CERTIFY, CHECK, AUDIT, FINISH = range(5)
# Share of a batch's votes that may differ when another kind of machine draws it again: last bits of logits change.
CHANGED = 0.05


@dataclass(eq=False)
class Check:
    """A question to some worker before a run is complete."""

    send: Callable[[Actor, Callable[[Any], None]], None]
    judge: Callable[[Actor, Any], None]  # raises NotOneFunction
    by: Actor | None = None  # the worker whose votes are checked, preferably by another one


@dataclass
class ClusterRun:
    """A run that is being certified."""

    number: int
    defense: str
    writer: RunWriter
    log: RunLog
    task: Task
    pixels: ImageCache
    sent: tuple[Any, Any]  # the certifier and the task, packed, in the object store
    fresh: Callable[[Audit], Task]  # makes the task of an audit
    phase: int = CERTIFY
    scheduler: Scheduler = field(init=False)
    measured: Measured | None = None
    peak: int = 0
    again: list[Certificate] = field(default_factory=list)  # drawn again in phase REDRAW
    samples: dict[Actor, BatchSample] = field(default_factory=dict)  # of each worker's batches
    checks: list[Check] = field(default_factory=list)  # not yet sent to a worker
    checking: list[tuple[Actor, Check]] = field(default_factory=list)
    holders: set[Actor] = field(default_factory=set)  # in phase FINISH: workers that still hold it
    losses: Counter[int] = field(default_factory=Counter)  # workers that died with a batch
    machines: Counter[str] = field(default_factory=Counter)  # number of workers that held it, by their device's name

    def __post_init__(self) -> None:
        self.phase = REDRAW if self.writer.resumed else CERTIFY
        self._open(self.writer.to_redraw() if self.writer.resumed else self.writer.left)

    def _open(self, indices: list[int]) -> None:
        self.scheduler = Scheduler(self.writer.start, self.task.labels, self.task.classes, indices)

    @property
    def key(self) -> int:
        """Its number in the dispatcher; images that are drawn again have another one."""
        return 2 * self.number + (self.phase != REDRAW)

    @property
    def dispatched(self) -> bool:
        """Whether votes are still handed out."""
        return self.phase <= CERTIFY

    def take(self, actor: Actor, batch: Batch, voted: Voted, decided: list[Certificate]) -> None:
        """Record a worker's batch and the images that it decides."""
        if self.phase == REDRAW:
            self.again += decided
            return
        self.samples.setdefault(actor, BatchSample(self.task.block)).see(batch, voted)
        for certificate in decided:
            self.writer.add(certificate)
            self.pixels.drop(certificate.index)

    def redrawn(self, holders: list[Actor]) -> None:
        """Go on with the images that are left. Raises NotOneFunction where counts drawn again contradict the record."""
        exactly = all(self.writer.drawn_on(actor.here) for actor in holders)
        self.writer.check_redrawn(self.again, exactly)
        self.phase = CERTIFY
        self._open(self.writer.left)

    def plan_checks(self) -> None:
        """Plan to draw a batch of each worker again, present or lost."""
        self.phase = CHECK
        self.checks = [self._again(actor, *s.kept) for actor, s in self.samples.items() if s.kept is not None]

    def plan_audit(self) -> None:
        """Plan the audit on fresh noise. It comes last, since a batch drawn again also names its worker."""
        self.phase = AUDIT
        if (audit := self.writer.audit(self.task.block)) is not None:
            self.checks.append(self._audit(audit))

    def _again(self, by: Actor, batch: Batch, voted: Voted) -> Check:
        def send(actor: Actor, then: Callable[[Any], None]) -> None:
            images = self.pixels.get(s.image for s in batch.spans)
            actor.call(actor.handle.draw, self.number, batch, images, then=then)

        def judge(actor: Actor, value: Any) -> None:
            changed = int(np.sum(value[0] != voted))
            if changed > (0 if actor.same_machine(by) else CHANGED * len(voted)):
                raise NotOneFunction(
                    f"{changed} of {len(voted)} votes of the worker on {by.node} differ when they are drawn again on "
                    f"{actor.node}: the defense keeps a state, so none of its certificates hold",
                    self.defense,
                )

        return Check(send, judge, by)

    def _audit(self, wanted: Audit) -> Check:
        def send(actor: Actor, then: Callable[[Any], None]) -> None:
            task = ray.put(pack(replace(self.fresh(wanted), images=not_here, labels=not_here)))
            images = self.pixels.get(wanted.claims)
            actor.call(actor.handle.audit, self.number, task, wanted, images, then=then)

        return Check(send, lambda _, hits: self.writer.check_audit(wanted, hits))

    def close(self) -> None:
        """Release the record to other processes."""
        self.writer.close()
        self.log.close()


def not_here(*_: object) -> Any:
    """Stand for images and labels in a task for a worker, to which images are sent with each batch."""
    raise AssertionError("a worker is sent its images")
