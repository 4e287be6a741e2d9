"""Audit of a run folder: what its own numbers imply. ``redraw`` certifies some of its images once more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpmath

from bench.errors import BenchError
from bench.io.files import digest, file_sha256
from bench.records import importing, metrics
from bench.records.findings import Finding
from bench.records.record import Record, read_run
from bench.smoothing.procedures import procedure_of
from bench.smoothing.votes import Certificate


def check_record(path: Path) -> Iterator[Finding]:
    """One finding for each question asked of the record alone. Raises BenchError where it cannot be read."""
    record = read_run(path)
    identity = record.identity
    if record.complete and not (path / "certificates.jsonl").is_file():
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
    if not c.n <= c.votes - c.n0 <= procedure.n or (procedure.kind == "fixed" and c.votes != procedure.max_votes):
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
