"""Write the record and the log of one run, in this process or on a Ray cluster."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.errors import DefenseFault
from bench.process import environment
from bench.process.console import duration
from bench.process.runlog import CERTIFY, PERIOD, LoggingReporter, Reporter, RunLog
from bench.records import fingerprint, metrics
from bench.records.schema import Cost, Fingerprint
from bench.records.shards import Shard
from bench.records.writer import RunFolder, run_folder
from bench.runs import fresh_noise
from bench.runs.certifier import NotOneFunction
from bench.runs.costs import Measured
from bench.runs.fresh_noise import Audit
from bench.runs.prepared import RunHeader
from bench.smoothing import gridnoise
from bench.smoothing.votes import Certificate, ImageProcedure


class RunWriter:
    """The record and the log of one run while images are certified. Every certificate added is on disk."""

    def __init__(
        self, out: Path, header: RunHeader, own_log: RunLog, reporter: Reporter, shard: Shard | None = None
    ) -> None:
        """Open or make the run's folder and move the log there.

        Raises BenchError where another process writes it.
        """
        self.header, self._reporter, self._log = header, LoggingReporter(reporter, own_log.write), own_log
        self.record = RunFolder(out, header.name, header.info, shard)
        done = {c.index for c in self.record.done}
        self.indices = header.info.identity.indices
        self.first = self.indices[0]  # of the whole run: the fingerprint is of this image
        if shard:
            self.indices = shard.part(self.indices)
        self.left = [i for i in self.indices if i not in done]
        self.resumed = bool(done)
        self._correct = sum(c.predicted == c.label for c in self.record.done)
        self._noted = -math.inf  # when progress was last logged
        self.complete = self.record.info.complete
        try:
            self._restate_radii()
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
            return
        for version, folder in _of_other_noise(out, header):
            self._reporter.say(
                f"{folder} is of grid noise {version}, whose votes are not mixed with those of "
                f"{gridnoise.VERSION}; {self.record.path.name} starts from its first image"
            )

    def _restate_radii(self) -> None:
        """Give the record the radii that ``--radii`` asks for now: its certificates, of the same identity, stay."""
        asked, info = self.header.plan.options.radii, self.record.info
        radii = list(self.header.plan.radii)
        if asked is None or radii == info.radii:
            return
        changes: dict[str, Any] = {"radii": radii, "arguments": {**info.arguments, "radii": asked}}
        if info.complete:
            changes["metrics"] = metrics.summarise(self.record.done, radii).as_json()
        self.record.update(**changes)
        self._reporter.say(f"{self.record.path}: its table now has the radii {', '.join(f'{r:g}' for r in radii)}")

    def check_same_function(self, found: Fingerprint, adder: str) -> None:
        """Check that ``adder`` certifies the function of the certificates so far; the first one records it.

        Raises DefenseFault naming ``adder``.
        """
        before = self.record.info.fingerprint
        if before is None:
            self.record.update(fingerprint=found)
        elif problem := fingerprint.differs(before, found, self.header.plan.arithmetic):
            raise DefenseFault(
                f"{adder} computes another function than {self.record.path} was begun with: {problem}; what decides "
                "logits is read or drawn outside of what the run's identity covers",
                self.header.plan.defense,
            )

    def to_redraw(self) -> list[int]:
        """Choose images to certify again before a resumed run goes on: the last one done and a random other one."""
        done = self.record.done
        if not done:
            return []
        last = done[len(done) - 1].index
        others = [c.index for c in done if c.index != last]
        return [last, *([secrets.choice(others)] if others else [])]

    def note_workers(self, machines: Mapping[str, int]) -> None:
        """Record new kinds of device that draw votes; ``machines``: number of workers by the device's name."""
        if set(machines) - set(self.record.info.environment.workers or {}):
            self._write_workers(machines)

    def _write_workers(self, machines: Mapping[str, int]) -> None:
        known = self.record.info.environment
        self.record.update(environment=known.replace(workers={**(known.workers or {}), **machines}))

    def drawn_on(self, here: Mapping[str, Any]) -> bool:
        """Whether all certificates so far were drawn on the kind of machine with the environment ``here``."""
        before = self.record.info.environment
        workers = before.workers or {here["device"]: 1}
        return environment.same_machine(here, before.as_json()) and set(workers) == {here["device"]}

    def check_redrawn(self, again: Sequence[Certificate], exactly: bool) -> None:
        """Raise NotOneFunction where images that were drawn again contradict the counts on record.

        ``exactly``: they were drawn on the kind of machine that drew them before. Else counts are two samples.
        """
        for new in again:
            old = self.record.done[self.record.done.place("index", new.index)]
            level = fresh_noise.LEVEL / len(again)
            if problem := fresh_noise.contradiction(old, new, self.header.plan.procedure, exactly, level):
                raise NotOneFunction(
                    f"other counts than before the run was resumed ({problem}): the defense keeps a state, or what "
                    "decides its logits changed",
                    self.header.plan.defense,
                )

    def audit(self, block: int) -> Audit | None:
        """Choose what to draw on fresh noise once all images are certified."""
        return fresh_noise.audit_of_run(self.record.done, block)

    def check_audit(self, done: Audit, hits: Mapping[int, int]) -> None:
        """Record the audit. Raises NotOneFunction where the certificates do not hold on fresh noise."""
        if problem := fresh_noise.overstated(self.header.plan.procedure, done, hits, self.record.done):
            raise NotOneFunction(
                f"its certificates do not hold on fresh noise: {problem}; its logits must follow from the noisy image "
                "and draws alone",
                self.header.plan.defense,
            )
        self.record.update(audit=done.record())

    def start(self, label: int) -> ImageProcedure:
        """Start the procedure of one image."""
        plan = self.header.plan
        return plan.procedure.certify(plan.sigma, label, self.record.info.identity.noise.tau)

    def announce(self, measured: Measured, devices: int) -> None:
        """Report what is left to do, and how long it may take on ``devices`` devices."""
        rows, procedure = self.header.rows, self.header.plan.procedure
        if measured.nan_rows:
            self._reporter.say(f"{measured.nan_rows} of {rows} rows of logits hold NaN: such votes count for no class")
        votes = len(self.left) * procedure.max_votes
        seconds = votes * measured.block_seconds / rows / devices
        self._reporter.say(
            f"{self.record.path.name}: {len(self.left)} images, {procedure.kind} procedure, at most {votes:,} votes, "
            f"about {duration(seconds)} at most"
        )
        self._log_progress()

    def progress(self) -> AbstractContextManager[Any]:
        """Open the progress bar; its value is called with ``so_far``."""
        bar: AbstractContextManager[Any] = self._reporter.certifying(
            self.header.defense, len(self.indices), len(self.record.done)
        )
        return bar

    @property
    def so_far(self) -> tuple[int, int]:
        """Images done, and the number that are correct."""
        return len(self.record.done), self._correct

    def add(self, certificate: Certificate) -> None:
        """Write one image's line."""
        self.record.append(certificate)
        self._correct += certificate.predicted == certificate.label
        if time.monotonic() - self._noted > PERIOD:
            self._log_progress()

    def _log_progress(self) -> None:
        self._noted = time.monotonic()
        done, correct = self.so_far
        self._log.write(f"{CERTIFY}{self.header.defense}: {done} of {len(self.indices)} images, {correct} right")

    def refuse(self, fault: NotOneFunction) -> NotOneFunction:
        """Set aside all certificates, which do not hold; returns the error with the place where they are."""
        return NotOneFunction(f"{fault}; set aside in {self.record.set_aside()}")

    def finish(self, measured: Measured, peak_memory: int, workers: dict[str, int] | None = None) -> None:
        """Mark the record complete, with its cost; ``workers``: number that drew votes, by the device's name."""
        done = self.record.done
        votes = sum(c.votes for c in done)
        cost = {
            **asdict(self.header.training_cost),
            "certify_seconds": sum(c.seconds for c in done),
            # A resumed run's seconds are of several processes; one calibration does not apply to them.
            "calibration_seconds": None if self.resumed else measured.calibration,
            "votes": votes,
            "base_forwards": round(votes * measured.base_forwards),
            "parameters": measured.parameters,
            "flops_per_vote": measured.flops,
            "peak_memory": peak_memory,
        }
        if workers is not None:
            self._write_workers(workers)
        self.record.finish(Cost.of(cost), metrics.summarise(done, self.record.info.radii))
        self._log.write(f"finished: {len(done)} images")

    def close(self) -> None:
        """Release the record to other processes."""
        self.record.close()


def _of_other_noise(out: Path, header: RunHeader) -> Iterator[tuple[str, Path]]:
    """Yield the folders of the same run with other versions of grid noise, as another certbench made them."""
    identity = header.info.identity
    noise = identity.noise
    for version in gridnoise.KINDS:
        if noise.grid_version not in (None, version):
            other = identity.replace(noise=noise.replace(grid_version=version))
            if (folder := run_folder(out, header.name, other)).exists():
                yield version, folder
