"""Images of a record certified once more: from its seed, or on fresh noise.

Data, base and defense are rebuilt from what the record says was typed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import plugins
from bench.errors import BenchError
from bench.models.arithmetic import steady
from bench.models.served import is_url
from bench.options import RunOptions
from bench.process import environment
from bench.records import fingerprint
from bench.records.findings import Finding
from bench.records.record import Record
from bench.runs import recheck
from bench.runs.certifier import Certifier
from bench.runs.device import Placed
from bench.runs.identity import make_task
from bench.runs.plan import Plan, make_plans
from bench.runs.session import Session
from bench.smoothing.engine import Pixels, certify
from bench.smoothing.scheduler import Certificate
from bench.training.weights import stored

SAMPLE = 5  # images drawn again without --deep
FALSE_ALARM = 1e-4  # chance that the two-sample tests accuse a true record
CHECK = "images drawn again from the seed give the recorded counts"
FRESH = "the certificates hold on fresh noise"


@dataclass(frozen=True)
class _Rebuilt:
    """What a record certified, on this machine."""

    plan: Plan
    placed: Placed
    session: Session

    def certify(self, chosen: list[int], tau: float) -> list[Certificate]:
        """The images once more."""
        plan = self.plan
        with steady(), torch.inference_mode():
            start = certify([self.placed.device], lambda label: plan.procedure.certify(plan.sigma, label, tau), chosen)
            return list(start)

    def fresh(self, wanted: recheck.Audit) -> dict[int, int]:
        """Hits of an audit's votes."""
        split = self.session.materials(self.plan).certified(self.plan)
        task = make_task(self.plan, split, self.session.device, recheck.fresh_noise(wanted))
        task = replace(task, block=self.placed.task.block)
        return recheck.draw(replace(self.placed.device, task=task), wanted, Pixels(task))


def draw_again(
    record: Record,
    session: Session,
    deep: bool,
    defense: str | None = None,
    base: str | None = None,
    fresh: bool = False,
) -> Iterator[Finding]:
    """Certify a sample of the images (all of them when ``deep``) from the seed, and compare counts.

    Exactly where machine and versions are the record's, else by a two-sample test. ``fresh``: also test certified
    images on noise of a new random seed (see ``recheck``). Without ``deep`` nothing is trained: weights that are not
    in the cache are reported as missing. A record is untrusted input, so no file is run and no server asked because a
    record names it: ``defense`` and ``base`` are those that the user names.
    """
    if not record.counted:
        why = "the log's model is not here" if record.imported else "there are none"
        yield Finding(f"(not drawn again: {why}) {CHECK}")
        return
    weights = record.identity.defense.weights
    if not deep and weights is not None and not stored(weights):
        yield Finding(f"(not drawn again: its trained weights are not in this cache; --deep trains anew) {CHECK}")
        return
    if why := _not_named(record.info.arguments, defense, base):
        yield Finding(f"(not drawn again: {why}) {CHECK}")
        return
    rebuilt = _rebuild(record, session, defense, base)
    if isinstance(rebuilt, str):
        yield Finding(CHECK, rebuilt)
        return
    yield _compare(record, rebuilt, deep)
    if fresh:
        yield _audit(record, rebuilt)


def _rebuild(record: Record, session: Session, defense: str | None, base: str | None) -> _Rebuilt | str:
    """What the record certified; where it cannot be had here, what is other than on record."""
    with plugins.only([defense] if defense else []):
        plan, _ = session.searched(_plan(record, defense, base))
        identity, task, fitted = session.prepare(plan)
    recorded = record.identity.as_json()
    if different := [k for k, v in identity.as_json().items() if recorded.get(k) != v]:
        return f"cannot be rebuilt here: {', '.join(different)} differ from the record's"
    wrong = next((c.index for c in record.counted if task.labels(c.index) != c.label), None)
    if wrong is not None:
        return f"image {wrong}: the data set's label is {task.labels(wrong)}"
    certifier = Certifier(plan.defense, fitted.defense, session.materials(plan).base, plan.arithmetic)
    placed = Placed(certifier, task, record.identity.indices[0])
    placed.widen(session.threads)
    before = record.info.fingerprint  # older records have none
    if before and (problem := fingerprint.differs(before, placed.fingerprint, plan.arithmetic)):
        return f"another function than the one certified is built here: {problem}"
    return _Rebuilt(plan, placed, session)


def _compare(record: Record, rebuilt: _Rebuilt, deep: bool) -> Finding:
    every = max(1, len(record.counted) // SAMPLE)
    kept = {c.index: c for c in (record.counted if deep else record.counted[::every][:SAMPLE])}
    again = rebuilt.certify(list(kept), record.identity.noise.tau)
    exactly = environment.same_machine(environment.describe(rebuilt.session.device), record.info.environment.as_json())
    how = "exactly" if exactly else "by a two-sample test, since machine or versions are not the record's"
    level, procedure = FALSE_ALARM / len(again), rebuilt.plan.procedure
    problems = (recheck.redrawn(kept[new.index], new, procedure, exactly, level) for new in again)
    return Finding(f"{len(again)} {CHECK}, {how}", next(filter(None, problems), ""))


def _audit(record: Record, rebuilt: _Rebuilt) -> Finding:
    wanted = recheck.of(record.counted, recheck.DEEP, recheck.VOTES)
    if wanted is None:
        return Finding(f"(nothing is certified, so nothing was tested) {FRESH}")
    problem = recheck.overstated(rebuilt.plan.procedure, wanted, rebuilt.fresh(wanted), record.counted)
    said = (
        f"{FRESH}: {len(wanted.claims)} images, {wanted.votes} votes each, seed {wanted.seed}, chance of a false alarm "
        f"at most {recheck.LEVEL:g}"
    )
    return Finding(said, problem)


def _not_named(arguments: dict[str, Any], defense: str | None, base: str | None) -> str:
    """What the user must name before the record's run is rebuilt; empty where all is here or named."""
    recorded, served = str(arguments.get("defenses")), str(arguments.get("base"))
    if recorded.endswith(".py") and defense is None:
        return f"its defense is a file, run only where you name it: --defense {shlex.quote(recorded)}"
    if is_url(served) and base is None:
        return f"its base is a server, asked only where you name it: --base {shlex.quote(served)}"
    return ""


def _plan(record: Record, defense: str | None, base: str | None) -> Plan:
    """What the record says was typed, with the files and servers that the user names in place of its own."""
    named = {k: v for k, v in (("defenses", defense), ("base", base)) if v is not None}
    try:
        plans = make_plans(RunOptions.of(record.info.arguments | named))
    except BenchError as e:
        raise BenchError(f"{record.path}: cannot be drawn again: {e}") from None
    if len(plans) != 1:
        raise BenchError(f"{record.path}: cannot be drawn again: its arguments are of {len(plans)} runs")
    return plans[0]
