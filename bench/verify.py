"""Audit of a run folder: what its own numbers imply, and a sample of its images drawn again.

The first part needs nothing but the record; the second rebuilds data, base and defense from the
identity and compares counts exactly on the same kind of machine.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch
from pydantic import ValidationError, validate_call
from scipy import stats

from bench import environment, importing, metrics, registry
from bench.anytime import procedure_of
from bench.arithmetic import steady
from bench.cache import digest, file_sha256, stored
from bench.certification import Certifier, Placed
from bench.certify import Certificate, certify
from bench.doctor import Finding
from bench.errors import BenchError
from bench.http_base import is_url
from bench.plan import Plan, make_plans
from bench.run import Session
from bench.store import Record, read_run

SAMPLE = 5  # images drawn again without --deep
FALSE_ALARM = 1e-4  # chance that the two-sample test accuses a true record


def check_record(path: Path) -> Iterator[Finding]:
    """One finding for each question asked of the record alone. Raises BenchError where it cannot be read."""
    record = read_run(path)
    identity = record.identity
    yield Finding("the folder's name is the hash of the identity", _name(record))
    yield Finding("every image of the identity is certified, once, and no other", _images(record))
    if record.imported:
        yield from _log(record)
    else:
        yield Finding("counts are possible, and as many as the procedure draws", _each(record, _counts))
        yield Finding("every radius follows from its counts at high precision", _each(record, _radius))
    if record.complete:
        same = file_sha256(path / "certificates.jsonl") == record.info["certificates_sha256"]
        same = same or record.info["certificates_sha256"] is None  # written before there was one
        said = "" if same else "certificates.jsonl is not the file that the finished run wrote"
        yield Finding("the certificates are the file that the finished run wrote", said)
        expected = json.loads(json.dumps(metrics.summarise(record.certificates, record.info["radii"])))
        said = "" if record.info["metrics"] == expected else "metrics in run.json are not those of the certificates"
        yield Finding("metrics are those of the certificates", said)
        votes = metrics.total(c.votes for c in record.certificates)
        said = "" if record.info["cost"]["votes"] == votes else f"cost.votes is not {votes}, the sum over images"
        yield Finding("votes are the sum over the images", said)
    else:
        yield Finding(
            "the run is complete", f"{len(record.certificates)} of {len(identity['indices'])} images are done"
        )


def draw_again(
    record: Record, session: Session, deep: bool, defense: str | None = None, base: str | None = None
) -> Finding:
    """Certify a sample of the images (all of them when ``deep``) from the seed, and compare counts.

    Exactly where machine and versions are the record's, else by a two-sample test. Without ``deep``
    nothing is trained: weights that are not in the cache are said to be missing. A record may be anybody's,
    so no file is run and no server asked because a record names it: ``defense`` and ``base`` are those that
    the user names.
    """
    check = "images drawn again from the seed give the recorded counts"
    if record.imported:
        return Finding(f"(not drawn again: the log's model is not here) {check}")
    weights = record.identity["defense"]["weights"]
    if not deep and weights is not None and not stored(weights):
        return Finding(f"(not drawn again: its trained weights are not in this cache; --deep trains anew) {check}")
    if why := _not_named(record.info["arguments"], defense, base):
        return Finding(f"(not drawn again: {why}) {check}")
    with registry.only([defense] if defense else []):
        plan, _ = session.searched(_plan(record, defense, base))
        identity, task, fitted = session.prepare(plan)
    if different := [k for k, v in json.loads(json.dumps(identity)).items() if record.identity.get(k) != v]:
        return Finding(check, f"cannot be rebuilt here: {', '.join(different)} differ from the record's")
    wrong = next((c.index for c in record.counted if task.labels(c.index) != c.label), None)
    if wrong is not None:
        return Finding(check, f"image {wrong}: the data set's label is {task.labels(wrong)}")
    every = max(1, len(record.counted) // SAMPLE)
    kept = {c.index: c for c in (record.counted if deep else record.counted[::every][:SAMPLE])}
    chosen = list(kept)
    tau = record.identity["noise"].get("tau", 0.0)
    certifier = Certifier(plan.defense, fitted.defense, session.materials(plan).base, plan.arithmetic)
    placed = Placed(certifier, task, chosen[0])
    placed.widen(session.threads)
    with steady(), torch.inference_mode():
        again = list(certify([placed.device], lambda label: plan.procedure.certify(plan.sigma, label, tau), chosen))
    here = environment.describe(session.device)
    exactly = all(here[k] == record.info["environment"].get(k) for k in ("device", "platform", "packages"))
    how = "exactly" if exactly else "by a two-sample test, since machine or versions are not the record's"
    check = f"{len(again)} {check}, {how}"
    for new in again:
        old = kept[new.index]
        if exactly and replace(old, seconds=0.0) != replace(new, seconds=0.0):
            return Finding(check, f"image {new.index}: {_votes(new)}, not {_votes(old)}")
        counts = np.array([[c.top_count, c.n - c.top_count] for c in (old, new)])
        if not exactly and stats.fisher_exact(counts).pvalue < FALSE_ALARM / len(again):
            return Finding(check, f"image {new.index}: {_votes(new)}, against {_votes(old)}")
    return Finding(check)


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
        plans = validate_call(config={"strict": True})(make_plans)(**record.info["arguments"] | named)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BenchError(f"{record.path}: cannot be drawn again: arguments: {where}: {first['msg']}") from None
    if len(plans) != 1:
        raise BenchError(f"{record.path}: cannot be drawn again: its arguments are of {len(plans)} runs")
    return plans[0]


def _votes(c: Certificate) -> str:
    return f"label {c.label}, predicted {c.predicted}, {c.top_count} of {c.n} votes"


def _log(record: Record) -> Iterator[Finding]:
    """What can be asked of an imported log: whether the record says what it says, and what is wrong with it."""
    claims, flags = importing.read_again(record)
    same = file_sha256(record.path / importing.SOURCE) == record.identity["imported"]["sha256"]
    yield Finding("the log in the folder is the one that was imported", "" if same else "its hash is another")
    other = next((c.index for c, now in zip(record.certificates, claims, strict=False) if c != now), None)
    said = f"image {other} is not as in the log" if other is not None else ""
    yield Finding("(counts are not known of an imported log) every image is as the log says", said)
    same = record.flags == flags
    yield Finding("flags are what the log gives", "" if same else "other things are wrong with it than flags say")
    for flag in flags:
        yield Finding("the log is without known defects", flag)


def _name(record: Record) -> str:
    wanted = digest(record.identity)[:8]
    return "" if record.path.resolve().name.endswith(f"-{wanted}") else f"the identity's hash is {wanted}"


def _images(record: Record) -> str:
    found, wanted = {c.index for c in record.certificates}, set(record.identity["indices"])
    if found - wanted:
        return f"image {min(found - wanted)} is not of this run"
    return f"image {min(wanted - found)} is missing" if wanted - found and record.complete else ""


def _each(record: Record, ask: Any) -> str:
    for certificate in record.counted:
        problem = ask(record.identity, certificate)
        if problem:
            return f"image {certificate.index}: {problem}"
    return ""


def _counts(identity: dict[str, Any], c: Certificate) -> str:
    procedure = procedure_of(identity)
    n0 = procedure.n0 if procedure.target == "selected" else 0
    if c.n0 != n0:
        return f"n0 is {c.n0}, the procedure's is {n0}"
    if not 0 <= c.top_count <= c.n or not 0 <= c.runner_up_count <= c.n - c.top_count:
        return f"{c.top_count} and {c.runner_up_count} of {c.n} votes are not possible"
    if (c.runner_up is None) != (c.runner_up_count == 0):
        return "the runner-up and its count disagree"
    if not c.n <= c.votes - c.n0 <= procedure.n or (procedure.kind == "fixed" and c.votes != procedure.most):
        return f"{c.votes} votes are not what the procedure draws"
    if c.seconds < 0:
        return "seconds are negative"
    return ""


def _at_high_precision(identity: dict[str, Any], c: Certificate) -> str:
    """The certificate's two inequalities at 40 digits, whatever the procedure.

    Were the probability p_lower + tau, at least ``top_count`` votes of ``n`` would have a chance of at
    most alpha (Clopper-Pearson); and the radius is at most sigma Phi^-1(p_lower).
    """
    with mpmath.workdps(40):
        alpha = mpmath.mpf(identity["procedure"]["alpha"])
        p = mpmath.mpf(c.p_lower) + mpmath.mpf(identity["noise"].get("tau", 0.0))
        if not p < 1 or binomial_tail(p, c.top_count, c.n) > alpha:
            return f"{c.top_count} of {c.n} votes do not support p_lower {c.p_lower} at alpha {float(alpha):g}"
        if mpmath.ncdf(mpmath.mpf(c.radius) / mpmath.mpf(identity["sigma"])) > mpmath.mpf(c.p_lower):
            return f"radius {c.radius} is above what p_lower {c.p_lower} supports"
    return ""


def binomial_tail(p: Any, top: int, n: int) -> Any:
    """P(Bin(n, p) >= top) for an mpmath p, its terms summed (mpmath's betainc loses its way beyond n = 1e4)."""
    log = mpmath.loggamma
    term = mpmath.exp(log(n + 1) - log(top + 1) - log(n - top + 1) + top * mpmath.log(p) + (n - top) * mpmath.log1p(-p))
    total, odds = term, p / (1 - p)
    for k in range(top, n):
        term *= odds * (n - k) / (k + 1)
        total += term
        if k > n * p and term < total * mpmath.mpf(10) ** -35:
            break
    return total


def _radius(identity: dict[str, Any], c: Certificate) -> str:
    procedure = procedure_of(identity)
    try:
        p_lower, radius = procedure.recompute(identity["sigma"], c.n, c.top_count, identity["noise"].get("tau", 0.0))
    except ValueError as e:
        return str(e)
    if p_lower > 0.5 and (problem := _at_high_precision(identity, c)):
        return problem
    if (c.p_lower, c.radius) != (p_lower, radius):
        return f"p_lower {c.p_lower} and radius {c.radius}; the counts give {p_lower} and {radius}"
    if (c.predicted is None) != (p_lower <= 0.5):
        return "it abstains or predicts against its bound"
    if procedure.target == "label" and c.predicted not in (None, c.label):
        return "the class tested is not the label"
    return ""
