"""Certify images of a record again, from its seed or on fresh noise (``bench verify``).

Data, base and defense are rebuilt from the arguments on record.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench import plugins
from bench.errors import BenchError
from bench.models.arithmetic import deterministic
from bench.models.served import is_url
from bench.options import RunOptions
from bench.process import environment
from bench.records import fingerprint
from bench.records.findings import Finding, Redrawn
from bench.records.record import Record
from bench.runs import fresh_noise
from bench.runs.certifier import DeviceCertifier
from bench.runs.plan import Plan, make_plans
from bench.runs.prepared import PreparedRun
from bench.runs.session import Session
from bench.smoothing import gridnoise
from bench.smoothing.engine import certify
from bench.smoothing.task import ImageCache
from bench.smoothing.votes import Certificate
from bench.training.weights import stored

SAMPLE = 5  # images drawn again without --deep
FALSE_ALARM = 1e-4  # chance that the two-sample tests of an honest record fail
CHECK = "images drawn again from the seed give the recorded counts"
FRESH = "the certificates hold on fresh noise"


@dataclass(frozen=True)
class Rebuilt:
    """The run of a record, prepared on this machine."""

    run: PreparedRun
    certifier: DeviceCertifier

    def certify(self, chosen: list[int], tau: float) -> list[Certificate]:
        """Certify images again."""
        plan = self.run.plan
        with deterministic(), torch.inference_mode():
            device = self.certifier.device
            return list(certify([device], lambda label: plan.procedure.certify(plan.sigma, label, tau), chosen))

    def draw(self, audit: fresh_noise.Audit) -> dict[int, int]:
        """Count the hits of an audit's votes."""
        task = self.run.fresh_task(audit.noise)
        return fresh_noise.draw(replace(self.certifier.device, task=task), audit, ImageCache(task).get(audit.claims))


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
    images on noise of a new random seed (see ``fresh_noise``). Without ``deep`` no defense or shared
    part is trained (a base of the card is, where the cache has none), and weights that are not in the cache, or code of
    a defense that has changed, are reported. A record is untrusted input: no file is run and no server asked because a
    record names it; ``defense`` and ``base`` are those that the user names.
    """
    if not record.counted:
        why = "the log comes without its model" if record.imported else "there are none"
        yield _not_drawn(why)
        return
    if not deep and not all(map(stored, record.identity.defense.trained)):
        yield _not_drawn("its trained weights are not in this cache; --deep retrains them")
        return
    if why := not_named(record.info.arguments, defense, base):
        yield _not_drawn(why)
        return
    with plugins.restricted_to([defense] if defense else []):
        plan = plan_of(record, defense, base)
    if not deep and plan.source != record.identity.defense.source:
        made_by = f"certbench {record.info.environment.certbench} made this record"
        why = f"the code of defense {plan.defense} has changed since {made_by}, so it takes that version"
        yield _not_drawn(why)
        return
    rebuilt = rebuild(record, session, plan if deep else chosen(plan, record), defense)
    if isinstance(rebuilt, str):
        yield Redrawn(CHECK, rebuilt)
        return
    yield _compare(record, rebuilt, deep)
    if fresh:
        yield _audit(record, rebuilt)


def _not_drawn(why: str) -> Redrawn:
    return Redrawn(f"(not drawn again: {why}) {CHECK}", why=why)


def chosen(plan: Plan, record: Record) -> Plan:
    """Return the plan with the settings alone that the record's search chose, where their weights are in the cache.

    The candidates that were not chosen may not be there, and are not trained again.
    """
    trained = record.identity.defense
    kept = [c for c in plan.candidates if json.loads(json.dumps(asdict(c[1]))) == trained.config]
    return replace(plan, candidates=kept) if kept and all(map(stored, trained.trained)) else plan


def rebuild(record: Record, session: Session, plan: Plan, defense: str | None) -> Rebuilt | str:
    """Prepare the record's run; where that is not possible here, return what differs from the record."""
    with plugins.restricted_to([defense] if defense else []):
        run = session.prepare(plan)
    recorded = record.identity.as_json()
    if different := [k for k, v in run.identity.as_json().items() if recorded.get(k) != v]:
        return f"cannot be rebuilt here: {', '.join(different)} differ from the record's"
    wrong = next((c.index for c in record.counted if run.task.labels(c.index) != c.label), None)
    if wrong is not None:
        return f"image {wrong}: the data set's label is {run.task.labels(wrong)}"
    certifier = DeviceCertifier(run.certifier, run.task, run.indices[0])
    certifier.use_threads(session.threads)
    before = record.info.fingerprint  # older records have none
    if before and (problem := fingerprint.differs(before, certifier.fingerprint, run.plan.arithmetic)):
        return f"the function built here is not the one certified: {problem}"
    return Rebuilt(run, certifier)


def _compare(record: Record, rebuilt: Rebuilt, deep: bool) -> Redrawn:
    every = max(1, len(record.counted) // SAMPLE)
    kept = {c.index: c for c in (record.counted if deep else record.counted[::every][:SAMPLE])}
    again = rebuilt.certify(list(kept), record.identity.noise.tau)
    here = environment.describe(rebuilt.run.task.device)
    exactly = environment.same_machine(here, record.info.environment.as_json())
    how = "exactly" if exactly else "by a two-sample test, since machine or versions are not the record's"
    level, procedure = FALSE_ALARM / len(again), rebuilt.run.plan.procedure
    problems = (fresh_noise.contradiction(kept[new.index], new, procedure, exactly, level) for new in again)
    return Redrawn(f"{len(again)} {CHECK}, {how}", next(filter(None, problems), ""), len(again), exactly)


def _audit(record: Record, rebuilt: Rebuilt) -> Finding:
    audit = fresh_noise.audit_of(record.counted, fresh_noise.DEEP, fresh_noise.VOTES)
    if audit is None:
        return Finding(f"(nothing is certified, so nothing was tested) {FRESH}")
    problem = fresh_noise.overstated(rebuilt.run.plan.procedure, audit, rebuilt.draw(audit), record.counted)
    check = (
        f"{FRESH}: {len(audit.claims)} images, {audit.votes} votes each, seed {audit.seed}, chance of a false alarm "
        f"at most {fresh_noise.LEVEL:g}"
    )
    return Finding(check, problem)


def not_named(arguments: dict[str, Any], defense: str | None, base: str | None) -> str:
    """Say what the user must name before the record's run is rebuilt; empty where nothing is missing."""
    recorded, served = str(arguments.get("defenses")), str(arguments.get("base"))
    if recorded.endswith(".py") and defense is None:
        return f"its defense is a file, run only where you name it: --defense {shlex.quote(recorded)}"
    if is_url(served) and base is None:
        return f"its base is a server, asked only where you name it: --base {shlex.quote(served)}"
    return ""


def plan_of(record: Record, defense: str | None, base: str | None) -> Plan:
    """Make the plan of the record's arguments, with the file and server that the user names in place of its own."""
    named = {k: v for k, v in (("defenses", defense), ("base", base)) if v is not None}
    try:
        plans = make_plans(RunOptions.of(record.info.arguments | named))
    except BenchError as e:
        raise BenchError(f"{record.path}: cannot be rebuilt: {e}") from None
    if len(plans) != 1:
        raise BenchError(f"{record.path}: cannot be rebuilt: its arguments are of {len(plans)} runs")
    version = record.identity.noise.grid_version
    if version is None:
        return plans[0]
    if version not in gridnoise.KINDS:
        raise BenchError(
            f"{record.path}: cannot be rebuilt: its grid noise is of version {version}, which this certbench does not "
            f"draw; use the one that made it, {record.info.environment.certbench}"
        )
    return replace(plans[0], grid_version=str(version))
