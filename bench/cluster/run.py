"""One run on a cluster: its phases, and what of its workers' votes is drawn once more before it is complete."""

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
from bench.runs.certifier import Drifted, Filling, Measured
from bench.runs.recheck import Audit, Sample
from bench.smoothing.scheduler import Scheduler
from bench.smoothing.task import ImageCache, Task
from bench.smoothing.votes import Batch, Certificate, Voted

# Phases. A resumed run first certifies some images once more; a certified one is checked, then let go of.
REDRAW, CERTIFY, CHECK, FINISH = range(4)
# Of a batch drawn again on another kind of machine than drew it: votes that last bits of logits may change.
CHANGED = 0.05


@dataclass(eq=False)
class Check:
    """What some worker is asked before a run is complete."""

    send: Callable[[Actor, Callable[[Any], None]], None]
    judge: Callable[[Actor, Any], None]  # raises Drifted
    by: Actor | None = None  # whose work is checked, so rather not asked itself


@dataclass
class ClusterRun:
    """A run that is being certified."""

    number: int
    defense: str
    filling: Filling
    log: RunLog
    task: Task
    pixels: ImageCache
    sent: tuple[Any, Any]  # what certifies and the task, packed, in the object store
    fresh: Callable[[Audit], Task]  # the task of an audit
    phase: int = CERTIFY
    scheduler: Scheduler = field(init=False)
    measured: Measured | None = None
    peak: int = 0
    again: list[Certificate] = field(default_factory=list)  # drawn again in phase REDRAW
    samples: dict[Actor, Sample] = field(default_factory=dict)  # of what each worker drew
    checks: list[Check] = field(default_factory=list)  # not yet sent to a worker
    checking: list[tuple[Actor, Check]] = field(default_factory=list)
    letting_go: set[Actor] = field(default_factory=set)  # in phase FINISH: workers that hold it still
    losses: Counter[int] = field(default_factory=Counter)  # workers that died with a batch
    machines: Counter[str] = field(default_factory=Counter)  # workers that held it, by their device's name

    def __post_init__(self) -> None:
        self.phase = REDRAW if self.filling.resumed else CERTIFY
        self._open(self.filling.to_redraw() if self.filling.resumed else self.filling.left)

    def _open(self, indices: list[int]) -> None:
        self.scheduler = Scheduler(self.filling.start, self.task.labels, self.task.classes, indices)

    @property
    def key(self) -> int:
        """By which the dispatcher knows it: another one for the images that are drawn again."""
        return 2 * self.number + (self.phase != REDRAW)

    @property
    def dispatched(self) -> bool:
        """Whether votes are still handed out."""
        return self.phase <= CERTIFY

    def take(self, actor: Actor, batch: Batch, voted: Voted, decided: list[Certificate]) -> None:
        """Note a batch that a worker drew, and the images that it decides."""
        if self.phase == REDRAW:
            self.again += decided
            return
        self.samples.setdefault(actor, Sample(self.task.block)).see(batch, voted)
        for certificate in decided:
            self.filling.add(certificate)
            self.pixels.drop(certificate.index)

    def redrawn(self, holders: list[Actor]) -> None:
        """Go on with the images that are left. Raises Drifted where those drawn again have other counts."""
        exactly = all(self.filling.drawn_on(actor.here) for actor in holders)
        self.filling.check_redrawn(self.again, exactly)
        self.phase = CERTIFY
        self._open(self.filling.left)

    def plan_checks(self) -> None:
        """All is certified: a batch of each worker, of those too that left, is drawn again; then comes fresh noise."""
        self.phase = CHECK
        self.checks = [self._again(actor, *s.kept) for actor, s in self.samples.items() if s.kept is not None]
        if (last := self.filling.audit(self.task.block)) is not None:
            self.checks.append(self._audit(last))

    def _again(self, by: Actor, batch: Batch, voted: Voted) -> Check:
        def send(actor: Actor, then: Callable[[Any], None]) -> None:
            images = self.pixels.get(s.image for s in batch.spans)
            actor.call(actor.handle.draw, self.number, batch, images, then=then)

        def judge(actor: Actor, value: Any) -> None:
            changed = int(np.sum(value[0] != voted))
            if changed > (0 if actor.same_machine(by) else CHANGED * len(voted)):
                raise Drifted(
                    f"{changed} of {len(voted)} votes of the worker on {by.node} are others when they are drawn again "
                    f"on {actor.node}: it keeps a state, so nothing that it certified holds",
                    self.defense,
                )

        return Check(send, judge, by)

    def _audit(self, wanted: Audit) -> Check:
        def send(actor: Actor, then: Callable[[Any], None]) -> None:
            task = ray.put(pack(replace(self.fresh(wanted), images=not_here, labels=not_here)))
            images = self.pixels.get(wanted.claims)
            actor.call(actor.handle.audit, self.number, task, wanted, images, then=then)

        return Check(send, lambda _, hits: self.filling.check_audit(wanted, hits))

    def close(self) -> None:
        """Let another process write."""
        self.filling.close()
        self.log.close()


def not_here(*_: object) -> Any:
    """In place of images and labels in a task that goes to a worker, which is sent its images."""
    raise AssertionError("a worker is sent its images")
