"""Check a run folder against its own numbers. ``redraw`` certifies some of its images again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpmath

from bench.errors import BenchError
from bench.io.files import file_sha256
from bench.records import importing, lines, metrics
from bench.records.findings import Finding
from bench.records.record import Record, read_run
from bench.records.schema import Identity
from bench.smoothing import bounds
from bench.smoothing.anytime import Anytime, tabulate
from bench.smoothing.votes import Certificate


def check_record(path: Path) -> Iterator[Finding]:
    """Yield a finding for each check of the record alone. Raises BenchError where it cannot be read."""
    record = read_run(path)
    info = record.info
    if record.complete and not (file := lines.certificates_file(path)).is_file():
        raise BenchError(
            f"{path}: certificates.jsonl is missing, and the run is complete; restore it, or move the folder away and "
            "run again"
        )
    yield Finding("the folder's name is the hash of the identity", _name(record))
    yield Finding("every image of the identity is certified, once, and no other", _images(record))
    if record.imported:
        yield from _log(record)
    else:
        yield Finding("counts are possible, and as many as the procedure draws", _each(record, _counts))
        yield Finding("every radius follows from its counts at high precision", _each(record, _radius))
        if isinstance(record.identity.procedure, Anytime):
            yield _error(record.identity, record.identity.procedure)
    if record.complete:
        same = lines.sha256(file) == info.certificates_sha256
        same = same or info.certificates_sha256 is None  # written before there was one
        problem = "" if same else "certificates.jsonl is not the file that the finished run wrote"
        yield Finding("the certificates are the file that the finished run wrote", problem)
        expected = json.loads(json.dumps(metrics.summarise(record.certificates, info.radii).as_json()))
        problem = "" if info.metrics == expected else "metrics in run.json are not those of the certificates"
        yield Finding("metrics are those of the certificates", problem)
        votes = metrics.total(c.votes for c in record.certificates)
        problem = "" if record.cost.votes == votes else f"cost.votes is not {votes}, the sum over images"
        yield Finding("votes are the sum over the images", problem)
    else:
        yield Finding(
            "the run is complete", f"{len(record.certificates)} of {len(record.identity.indices)} images are done"
        )


def _log(record: Record) -> Iterator[Finding]:
    """Check an imported record: whether it states what its log states, and the log's defects."""
    log, source = importing.read_again(record), record.identity.imported
    same = source is not None and file_sha256(record.path / importing.SOURCE) == source.sha256
    yield Finding("the log in the folder is the one that was imported", "" if same else "its hash is another")
    pairs = zip(record.certificates, log.certificates, strict=False)
    other = next((c.index for c, now in pairs if c != now), None)
    problem = f"image {other} is not as in the log" if other is not None else ""
    yield Finding("(counts are not known of an imported log) every image is as the log says", problem)
    same = record.flags == log.flags
    yield Finding("flags are what the log gives", "" if same else "the log has other defects than its flags state")
    for flag in log.flags:
        yield Finding("the log is without known defects", flag)


def _error(identity: Identity, procedure: Anytime) -> Finding:
    error = max(tabulate(procedure, identity.sigma, identity.noise.tau).errors, default=0.0)
    if procedure.calibration == "exact":
        bound = f"{bounds.printed_reach(error, 9)} an image, computed exactly"
    else:
        bound = f"{error:g} an image, by Ville's inequality"
    problem = "" if error <= procedure.alpha else f"that is more than alpha {procedure.alpha:g}"
    return Finding(f"a false radius has a chance of at most {bound}", problem)


def _name(record: Record) -> str:
    suffix = record.identity.folder_suffix
    return "" if record.path.resolve().name.endswith(suffix) else f"the identity's hash is {suffix[1:]}"


def _images(record: Record) -> str:
    found, wanted = {c.index for c in record.certificates}, set(record.identity.indices)
    if found - wanted:
        return f"image {min(found - wanted)} is not of this run"
    return f"image {min(wanted - found)} is missing" if wanted - found and record.complete else ""


def _each(record: Record, problem_with: Callable[[Identity, Certificate], str]) -> str:
    for certificate in record.counted:
        if problem := problem_with(record.identity, certificate):
            return f"image {certificate.index}: {problem}"
    return ""


def _counts(identity: Identity, c: Certificate) -> str:
    procedure = identity.procedure
    n0 = procedure.selection_votes
    if c.n0 != n0:
        return f"n0 is {c.n0}, the procedure's is {n0}"
    if not 0 <= c.top_count <= c.n or not 0 <= c.runner_up_count <= c.n - c.top_count:
        return f"{c.top_count} and {c.runner_up_count} of {c.n} votes are not possible"
    if (c.runner_up is None) != (c.runner_up_count == 0):
        return "the runner-up and its count disagree"
    stopped = _stopped(identity, c)
    most, fixed = 0 if stopped else procedure.n, procedure.kind == "fixed" and not stopped
    if not c.n <= c.votes - c.n0 <= most or (fixed and c.votes != procedure.max_votes):
        return f"{c.votes} votes are not what the procedure draws"
    if c.seconds < 0:
        return "seconds are negative"
    return ""


def _stopped(identity: Identity, c: Certificate) -> bool:
    """Whether target "correct" stopped after the selection, as it does where the selected class is not the label."""
    return identity.sampling.target == "correct" and c.n == 0


def _at_high_precision(identity: Identity, c: Certificate) -> str:
    """Check the certificate's two inequalities at 40 digits, whatever the procedure.

    Were the probability p_lower + tau, at least ``top_count`` votes of ``n`` would have a chance of at
    most alpha (Clopper-Pearson); and the radius is at most sigma Phi^-1(p_lower).
    """
    with mpmath.workdps(40):
        alpha = mpmath.mpf(identity.sampling.alpha)
        p = mpmath.mpf(c.p_lower) + mpmath.mpf(identity.noise.tau)
        if not p < 1 or binomial_tail(p, c.top_count, c.n) > alpha:
            return f"{c.top_count} of {c.n} votes do not support p_lower {c.p_lower} at alpha {float(alpha):g}"
        if mpmath.ncdf(mpmath.mpf(c.radius) / mpmath.mpf(identity.sigma)) > mpmath.mpf(c.p_lower):
            return f"radius {c.radius} is above what p_lower {c.p_lower} supports"
    return ""


def binomial_tail(p: Any, top: int, n: int) -> Any:
    """Compute P(Bin(n, p) >= top) for an mpmath p, term by term (mpmath's betainc is wrong beyond n = 1e4)."""
    log = mpmath.loggamma
    term = mpmath.exp(log(n + 1) - log(top + 1) - log(n - top + 1) + top * mpmath.log(p) + (n - top) * mpmath.log1p(-p))
    total, odds = term, p / (1 - p)
    for k in range(top, n):
        term *= odds * (n - k) / (k + 1)
        total += term
        if k > n * p and term < total * mpmath.mpf(10) ** -35:
            break
    return total


def _radius(identity: Identity, c: Certificate) -> str:
    procedure = identity.procedure
    try:
        p_lower, radius = procedure.recompute(identity.sigma, c.n, c.top_count, identity.noise.tau)
    except ValueError as e:
        return str(e)
    if p_lower > 0.5 and (problem := _at_high_precision(identity, c)):
        return problem
    if (c.p_lower, c.radius) != (p_lower, radius):
        return f"p_lower {c.p_lower} and radius {c.radius}; the counts give {p_lower} and {radius}"
    if _stopped(identity, c):
        right = c.predicted in (None, c.label)
        return "it has no votes, though its class is not a wrong one" if right else ""
    if (c.predicted is None) != (p_lower <= 0.5):
        return "it abstains or predicts against its bound"
    if procedure.target != "selected" and c.predicted not in (None, c.label):
        return "the class tested is not the label"
    return ""
