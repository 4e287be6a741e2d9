"""One run between its preparation and its record: what certifies, what that costs, and the record being filled.

The same for runs of this process and for those on a Ray cluster.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import arithmetic, blocks, environment, fitting, metrics, registry
from bench.arithmetic import steady
from bench.base import BaseModel, LocalBase
from bench.certify import Certificate, Device, Model, Task, check_rows, side_by_side
from bench.console import duration
from bench.costs import cost_per_vote, distinct
from bench.errors import BenchError, DefenseFault, one_line
from bench.identity import run_name
from bench.interface import Defense, Draw
from bench.plan import Plan
from bench.procedures import Procedure
from bench.runlog import CERTIFY, PERIOD, Logged, Reporter, RunLog, log
from bench.shards import Shard
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

    def copy(self, share_weights: bool) -> Certifier:
        """Another one, for another device or, with the same weights in memory, for another thread."""
        kept: dict[int, Any] = {}
        if share_weights:
            tensors = [t for m in (self.defense, self.base.module) for t in (*m.parameters(), *m.buffers())]
            kept = {id(t): t for t in tensors}
        defense, base = copy.deepcopy((self.defense, self.base), kept)
        return Certifier(self.name, defense, base, self.arithmetic)


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

    block_seconds: float  # with every thread at work
    base_forwards: float  # a vote
    flops: float | None  # a vote
    parameters: int | None
    calibration: float | None
    nan_rows: int  # of the first block
    rows: int  # votes of a batch that keep the device busy
    at_once: int  # votes that it draws at the same time


class Drifted(DefenseFault):
    """Other logits at the end of a run than at its start: nothing that was certified holds."""


class Placed:
    """What is certified, on one device and checked there."""

    def __init__(self, certifier: Certifier, task: Task, index: int) -> None:
        """Raises DefenseFault where logits are no function of one image (see ``check_rows``)."""
        self.certifier, self.task, self._index = certifier, task, index
        environment.reset_peak_memory(task.device)
        self._models = [certifier.model(task.device)]
        with steady(), torch.inference_mode():
            self._reference = self._look(self._models[0])
            with fitting.blame(certifier.name, "in the check of its rows"):
                self._block_seconds = check_rows(self._models[0], task, index)

    @property
    def device(self) -> Device:
        """As the engine takes it."""
        return Device(self.task, self._models)

    def widen(self, threads: int) -> None:
        """Draw votes in so many threads: on a CPU a block in each, on a GPU noise in each beside one's forward pass.

        On a CPU in one where the defense cannot be copied, or its copies do not fit into memory.
        """
        device, name = self.task.device, self.certifier.name
        if threads == 1 or not isinstance(self.certifier.base, LocalBase):
            return
        if device.type != "cpu":
            self._models = [in_turn(self._models[0])] * threads
            return
        try:
            # Modules may keep in attributes what they are about, so each thread has modules of its own.
            copies = [self.certifier.copy(share_weights=True).model(device) for _ in range(threads - 1)]
            same = self._unchanged(copies)
        except Exception as e:
            if isinstance(e, BenchError) and not blocks.out_of_memory(e):
                raise
            log.warning("%s votes in one thread, not %d: %s", name, threads, one_line(e))
            return
        if not same:
            raise DefenseFault("a copy of it gives other logits: keep all that decides them in its modules", name)
        self._models += copies

    def beside(self, device: torch.device) -> Placed:
        """The same on another device. Raises BenchError where logits are others there, and so votes."""
        there = Placed(
            self.certifier.copy(share_weights=False).to(device), replace(self.task, device=device), self._index
        )
        if not _equal(there._reference.cpu(), self._reference.cpu()):
            raise BenchError(
                f"{device} computes other logits than {self.task.device}: counts would depend on who draws a vote; "
                "choose GPUs of one kind with CUDA_VISIBLE_DEVICES"
            )
        return there

    def measure(self, calibrate: bool) -> Measured:
        """What a vote costs here and, if so asked, the unit of seconds elsewhere."""
        at_once = len(self._models) if self.task.device.type == "cpu" else 1
        with steady(), torch.inference_mode():
            per_vote = cost_per_vote(self.certifier.defense, self.task, self._index)  # counted, so not as compiled
            calibration = environment.calibration_seconds(self.task.device) / at_once if calibrate else None
        parameters = None if per_vote.flops is None else distinct([self.certifier.defense, *per_vote.classifiers])
        return Measured(
            block_seconds=self._block_seconds / at_once,
            base_forwards=per_vote.base_forwards,
            flops=per_vote.flops,
            parameters=parameters,
            calibration=calibration,
            nan_rows=int(self._reference.isnan().any(1).sum()),
            rows=self.device.rows,
            at_once=self.device.at_once,
        )

    def finish(self) -> int:
        """The peak of memory in bytes. Raises Drifted, or BenchError where the base is no longer what it was."""
        self.certifier.base.check_unchanged(self.certifier.name)
        if not self._unchanged(self._models):
            raise Drifted(
                "other logits at the end of the run than at its start for the same image and draw: it keeps a state, "
                "so nothing that it certified holds",
                self.certifier.name,
            )
        return environment.peak_memory(self.task.device)

    def _look(self, model: Model) -> Tensor:
        """Logits of a block that is always the same."""
        return blocks.check_logits(model, self.task, self._index)

    def _unchanged(self, models: list[Model]) -> bool:
        found: list[bool] = []

        def look(model: Model, _: threading.Event) -> None:
            found.append(_equal(self._look(model), self._reference))

        with steady():
            side_by_side([partial(look, model) for model in dict.fromkeys(models)])
        return all(found)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def in_turn(model: Model) -> Model:
    """The model for several threads, one at a time: one block in memory, and modules may keep what they like."""
    lock = threading.Lock()

    def alone(x: Tensor, draw: Draw) -> Tensor:
        with lock:
            return model(x, draw)

    return alone


class Filling:
    """The record and the log of one run while they are filled. Every certificate added is on disk."""

    def __init__(
        self, out: Path, ready: Ready, own_log: RunLog, reporter: Reporter, shard: Shard | None = None
    ) -> None:
        """Open or make its folder, into which the log goes. Raises BenchError where another process writes it."""
        self._ready, self._reporter, self._log = ready, Logged(reporter, own_log.write), own_log
        plan = ready.plan
        self._name = registry.short_name(plan.defense)
        self.record = Run(out, run_name(plan), ready.identity, ready.extra, shard)
        done = {c.index for c in self.record.done}
        self.indices = ready.identity["indices"]
        if shard:
            self.indices = shard.part(self.indices)
        self.left = [i for i in self.indices if i not in done]
        self.resumed = bool(done)
        self._correct = sum(c.predicted == c.label for c in self.record.done)
        self._spoke = -math.inf
        self.complete = self.record.info["status"] == "complete"
        try:
            if self.complete:
                own_log.discard()
                reporter.say(f"{self.record.path}: already complete, nothing to do")
                return
            own_log.move_into(self.record.path)
        except BaseException:
            self.record.close()
            raise
        if done:
            own_log.write(f"resumed: {len(done)} of {len(self.indices)} images are done")

    def start(self, label: int) -> Procedure:
        """The procedure of one image."""
        plan = self._ready.plan
        return plan.procedure.certify(plan.sigma, label, self.record.info["identity"]["noise"]["tau"])

    def announce(self, measured: Measured, devices: int) -> None:
        """Say what is left to do, and how long it may take on so many devices."""
        rows, procedure = self._ready.identity["block"][0], self._ready.plan.procedure
        if measured.nan_rows:
            self._reporter.say(f"{measured.nan_rows} of {rows} rows of logits hold NaN: such votes count for no class")
        votes = len(self.left) * procedure.most
        seconds = votes * measured.block_seconds / rows / devices
        self._reporter.say(
            f"{self.record.path.name}: {len(self.left)} images, {procedure.kind} procedure, at most {votes:,} votes, "
            f"about {duration(seconds)} at most"
        )
        self._note_progress()

    def progress(self) -> Any:
        """A context whose value is called with ``so_far``."""
        return self._reporter.certifying(self._name, len(self.indices), len(self.record.done))

    @property
    def so_far(self) -> tuple[int, int]:
        """Images done, and how many of them are right."""
        return len(self.record.done), self._correct

    def add(self, certificate: Certificate) -> None:
        """Write one image's line."""
        self.record.append(certificate)
        self._correct += certificate.predicted == certificate.label
        if time.monotonic() - self._spoke > PERIOD:
            self._note_progress()

    def _note_progress(self) -> None:
        self._spoke = time.monotonic()
        done, correct = self.so_far
        self._log.write(f"{CERTIFY}{self._name}: {done} of {len(self.indices)} images, {correct} right")

    def refuse(self, drifted: Drifted) -> Drifted:
        """Take out of the record what does not hold; the error, saying where that is."""
        return Drifted(f"{drifted}; set aside in {self.record.set_aside()}")

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
        self._log.write(f"finished: {len(done)} images")

    def close(self) -> None:
        """Let another process write."""
        self.record.close()
