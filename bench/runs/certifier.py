"""One run between its preparation and its record: what certifies, what that costs, and the record being filled.

The same for runs of this process and for those on a Ray cluster.
"""

from __future__ import annotations

import copy
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import plugins
from bench.errors import DefenseFault
from bench.interface import Defense, Draw
from bench.models import arithmetic
from bench.models.base import BaseModel
from bench.process import environment
from bench.process.console import duration
from bench.process.runlog import CERTIFY, PERIOD, Logged, Reporter, RunLog
from bench.records import fingerprint, metrics
from bench.records.schema import Cost, Fingerprint, Identity, RunInfo
from bench.records.shards import Shard
from bench.records.writer import RunFolder
from bench.runs import fitting, recheck
from bench.runs.identity import run_name
from bench.runs.plan import Plan
from bench.runs.recheck import Audit
from bench.smoothing.engine import Model
from bench.smoothing.procedures import Procedure
from bench.smoothing.scheduler import Certificate


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
            with fitting.blame(kept.name, "in certification", alone=False):
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
    info: RunInfo
    cost: dict[str, Any]

    @property
    def identity(self) -> Identity:
        """All that determines the certificates."""
        return self.info.identity

    @property
    def rows(self) -> int:
        """Rows of a block."""
        assert self.identity.block is not None
        return self.identity.block[0]


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
    """What was certified proved not to be one fixed function of one image: nothing that was certified holds."""


class Filling:
    """The record and the log of one run while they are filled. Every certificate added is on disk."""

    def __init__(
        self, out: Path, ready: Ready, own_log: RunLog, reporter: Reporter, shard: Shard | None = None
    ) -> None:
        """Open or make its folder, into which the log goes. Raises BenchError where another process writes it."""
        self._ready, self._reporter, self._log = ready, Logged(reporter, own_log.write), own_log
        plan = ready.plan
        self._name = plugins.short_name(plan.defense)
        self.record = RunFolder(out, run_name(plan), ready.info, shard)
        done = {c.index for c in self.record.done}
        self.indices = ready.identity.indices
        self.first = self.indices[0]  # of the whole run, of which the fingerprint is
        if shard:
            self.indices = shard.part(self.indices)
        self.left = [i for i in self.indices if i not in done]
        self.resumed = bool(done)
        self._correct = sum(c.predicted == c.label for c in self.record.done)
        self._spoke = -math.inf
        self.complete = self.record.info.complete
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

    def same_function(self, found: Fingerprint, who: str) -> None:
        """Check that who adds certificates certifies the function of those before; the first states it.

        Raises DefenseFault naming ``who``.
        """
        before = self.record.info.fingerprint
        if before is None:
            self.record.update(fingerprint=found)
        elif problem := fingerprint.differs(before, found, self._ready.plan.arithmetic):
            raise DefenseFault(
                f"{who} computes another function than {self.record.path} was begun with: {problem}; what decides "
                "logits is read or drawn outside of what the run's identity covers",
                self._ready.plan.defense,
            )

    def to_redraw(self) -> list[int]:
        """Images to certify once more before a resumed run goes on: the last one done and, at random, another."""
        done = self.record.done
        if not done:
            return []
        last = done[len(done) - 1].index
        others = [c.index for c in done if c.index != last]
        return [last, *([secrets.choice(others)] if others else [])]

    def note_workers(self, machines: Mapping[str, int]) -> None:
        """State, where that is new, which kinds of device draw votes; ``machines``: workers by their device's name."""
        before = self.record.info.environment.workers or {}
        if set(machines) - set(before):
            self._write_workers(machines)

    def _write_workers(self, machines: Mapping[str, int]) -> None:
        known = self.record.info.environment
        self.record.update(environment=known.replace(workers={**(known.workers or {}), **machines}))

    def drawn_on(self, here: Mapping[str, Any]) -> bool:
        """Whether all that is on record was drawn on the kind of machine with the environment ``here``."""
        before = self.record.info.environment
        workers = before.workers or {here["device"]: 1}
        return environment.same_machine(here, before.as_json()) and set(workers) == {here["device"]}

    def check_redrawn(self, again: Sequence[Certificate], exactly: bool) -> None:
        """Raise Drifted where images that were drawn again do not have the counts on record.

        ``exactly``: they were drawn on the kind of machine that drew them before. Else counts are two samples.
        """
        for new in again:
            old = self.record.done[self.record.done.place("index", new.index)]
            level = recheck.LEVEL / len(again)
            if problem := recheck.redrawn(old, new, self._ready.plan.procedure, exactly, level):
                raise Drifted(
                    f"other counts than before the run was resumed ({problem}): it keeps a state, or what decides its "
                    "logits changed",
                    self._ready.plan.defense,
                )

    def audit(self, block: int) -> Audit | None:
        """What to draw on fresh noise now that all is certified."""
        return recheck.at_the_end(self.record.done, block)

    def check_audit(self, done: Audit, hits: Mapping[int, int]) -> None:
        """Record the audit. Raises Drifted where the certificates do not hold on fresh noise."""
        if problem := recheck.overstated(self._ready.plan.procedure, done, hits, self.record.done):
            raise Drifted(
                f"its certificates do not hold on fresh noise: {problem}; its logits must follow from the noisy image "
                "and draws alone",
                self._ready.plan.defense,
            )
        self.record.update(audit=done.record())

    def start(self, label: int) -> Procedure:
        """The procedure of one image."""
        plan = self._ready.plan
        return plan.procedure.certify(plan.sigma, label, self.record.info.identity.noise.tau)

    def announce(self, measured: Measured, devices: int) -> None:
        """Say what is left to do, and how long it may take on so many devices."""
        rows, procedure = self._ready.rows, self._ready.plan.procedure
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
            self._write_workers(workers)
        self.record.finish(Cost.of(cost), metrics.summarise(done, self._ready.plan.card.radii))
        self._log.write(f"finished: {len(done)} images")

    def close(self) -> None:
        """Let another process write."""
        self.record.close()
