"""One run between its preparation and its record: what certifies, what that costs, and the record being filled."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import arithmetic, environment, fitting, metrics, registry
from bench.base import BaseModel
from bench.certify import Certificate, Model, Task, check_rows
from bench.console import duration
from bench.costs import cost_per_vote, distinct
from bench.interface import Defense, Draw
from bench.plan import Plan
from bench.procedures import Procedure
from bench.runlog import Reporter
from bench.store import Run


@dataclass(frozen=True)
class Certifier:
    """A fitted defense and the base it may ask: the map that is certified. It can be taken to another process."""

    name: str
    defense: Defense
    base: BaseModel  # held here, since what a defense sees of it holds it weakly
    arithmetic: tuple[str, ...] = ()

    def model(self, device: torch.device) -> Model:
        """Logits [B, classes] of noisy pixels, as votes are computed there. Raises DefenseFault naming the defense."""
        logits, kept = arithmetic.model(self.defense, self.arithmetic, device), self

        def model(x: Tensor, draw: Draw) -> Tensor:
            with fitting.blame(kept.name, "in certification"):
                return logits(x, draw)

        return model

    def to(self, device: torch.device) -> Certifier:
        """The same, moved to a device."""
        self.defense.to(device)
        self.base.module.to(device)
        return self

    def replica(self, task: Task, device: torch.device) -> tuple[Model, Task]:
        """A copy of its own on another device, and the task there."""
        defense, base = copy.deepcopy((self.defense, self.base))
        there = Certifier(self.name, defense, base, self.arithmetic).to(device)
        return there.model(device), replace(task, device=device)


@dataclass(frozen=True)
class Ready:
    """A run before its first vote: what its record will say, and what its training cost."""

    plan: Plan  # with its searched settings chosen
    identity: dict[str, Any]
    extra: dict[str, Any]
    cost: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What certifying costs on one device, as measured before the first vote."""

    block_seconds: float
    base_forwards: float  # a vote
    flops: float | None  # a vote
    parameters: int | None
    calibration: float | None


def measure(certifier: Certifier, model: Model, task: Task, index: int, calibrate: bool) -> Measured:
    """Refuse a map that is no function of one image (see ``check_rows``), else say what a vote costs."""
    with fitting.blame(certifier.name, "in the check of its rows"):
        seconds = check_rows(model, task, index)
    per_vote = cost_per_vote(certifier.defense, task, index)  # operations are counted, not compiled
    parameters = None if per_vote.flops is None else distinct([certifier.defense, *per_vote.classifiers])
    calibration = environment.calibration_seconds(task.device) if calibrate else None
    return Measured(seconds, per_vote.base_forwards, per_vote.flops, parameters, calibration)


class Filling:
    """The record of one run while it is filled. Every certificate added is on disk."""

    def __init__(self, out: Path, ready: Ready, reporter: Reporter) -> None:
        """Open or make its folder. Raises BenchError where another process writes it."""
        self._ready, self._reporter = ready, reporter
        plan = ready.plan
        self._name = registry.short_name(plan.defense)
        self.record = Run(out, f"{plan.card.name}-{self._name}-s{plan.sigma:g}", ready.identity, ready.extra)
        done = {c.index for c in self.record.done}
        self.left = [i for i in ready.identity["indices"] if i not in done]
        self.resumed = bool(done)
        self._correct = sum(c.predicted == c.label for c in self.record.done)
        self.complete = self.record.info["status"] == "complete"
        if self.complete:
            reporter.say(f"{self.record.path}: already complete, nothing to do")

    def start(self, label: int) -> Procedure:
        """The procedure of one image."""
        plan = self._ready.plan
        return plan.procedure.certify(plan.sigma, label, self.record.info["identity"]["noise"]["tau"])

    def announce(self, seconds_per_vote: float) -> None:
        """Say what is left to do, and how long it may take."""
        procedure = self._ready.plan.procedure
        votes = len(self.left) * procedure.most
        self._reporter.say(
            f"{self.record.path.name}: {len(self.left)} images, {procedure.kind} procedure, at most {votes:,} votes, "
            f"about {duration(votes * seconds_per_vote)} at most"
        )

    def progress(self) -> Any:
        """A context whose value is called with ``so_far``."""
        total = len(self._ready.identity["indices"])
        return self._reporter.certifying(self._name, total, len(self.record.done))

    @property
    def so_far(self) -> tuple[int, int]:
        """Images done, and how many of them are right."""
        return len(self.record.done), self._correct

    def add(self, certificate: Certificate) -> None:
        """Write one image's line."""
        self.record.append(certificate)
        self._correct += certificate.predicted == certificate.label

    def finish(self, measured: Measured, peak_memory: int, workers: dict[str, int] | None = None) -> None:
        """Mark the record complete, with all that it cost; ``workers``: how many drew votes, by their device's name."""
        done = self.record.done
        votes = sum(c.votes for c in done)
        cost = {
            **self._ready.cost,
            "certify_seconds": sum(c.seconds for c in done),
            # Seconds of a resumed run are of several processes, which one calibration says nothing of.
            "calibration_seconds": None if self.resumed else measured.calibration,
            "votes": votes,
            "base_forwards": round(votes * measured.base_forwards),
            "parameters": measured.parameters,
            "flops_per_vote": measured.flops,
            "peak_memory": peak_memory,
        }
        if workers is not None:
            self.record.info["environment"]["workers"] = workers
        self.record.finish(cost, metrics.summarise(done, self._ready.plan.card.radii))

    def close(self) -> None:
        """Let another process write."""
        self.record.close()
