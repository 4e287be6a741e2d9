"""Audit of a run folder: what its own numbers imply, and a sample of its images drawn again.

The first part needs nothing but the record; the second rebuilds data, base and defense from the
identity and compares counts exactly on the same kind of machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import metrics
from bench.anytime import procedure_of
from bench.cache import digest
from bench.certify import Certificate
from bench.doctor import Finding
from bench.store import Record, read_run


def check_record(path: Path) -> Iterator[Finding]:
    """One finding for each question asked of the record alone. Raises BenchError where it cannot be read."""
    record = read_run(path)
    identity = record.identity
    yield _finding("the folder's name is the hash of the identity", _name(record))
    yield _finding("every image of the identity is certified, once, and no other", _images(record))
    yield _finding("counts are possible, and as many as the procedure draws", _each(record, _counts))
    yield _finding("every radius follows from its counts at high precision", _each(record, _radius))
    if record.complete:
        expected = json.loads(json.dumps(metrics.summarise(record.certificates, record.info["radii"])))
        said = "" if record.info["metrics"] == expected else "metrics in run.json are not those of the certificates"
        yield _finding("metrics are those of the certificates", said)
        votes = sum(c.votes for c in record.certificates)
        said = "" if record.info["cost"]["votes"] == votes else f"cost.votes is not {votes}, the sum over images"
        yield _finding("votes are the sum over the images", said)
    else:
        yield _finding("the run is complete", f"{len(record.certificates)} of {len(identity['indices'])} images are done")


def compare(record: Record, again: list[Certificate]) -> Finding:
    """Whether images drawn again from the seed gave the recorded counts."""
    kept = {c.index: c for c in record.certificates}
    for new in again:
        if _comparable(kept[new.index]) != _comparable(new):
            return Finding(f"{len(again)} images drawn again give the same counts", f"image {new.index} differs")
    return Finding(f"{len(again)} images drawn again give the same counts")


def _comparable(certificate: Certificate) -> dict[str, Any]:
    return asdict(replace(certificate, seconds=0.0))


def _finding(check: str, problem: str) -> Finding:
    return Finding(check, problem)


def _name(record: Record) -> str:
    wanted = digest(record.identity)[:8]
    return "" if record.path.resolve().name.endswith(f"-{wanted}") else f"the identity's hash is {wanted}"


def _images(record: Record) -> str:
    found, wanted = {c.index for c in record.certificates}, set(record.identity["indices"])
    if found - wanted:
        return f"image {min(found - wanted)} is not of this run"
    return f"image {min(wanted - found)} is missing" if wanted - found and record.complete else ""


def _each(record: Record, ask: Any) -> str:
    for certificate in record.certificates:
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


def _radius(identity: dict[str, Any], c: Certificate) -> str:
    procedure = procedure_of(identity)
    try:
        p_lower, radius = procedure.recompute(identity["sigma"], c.n, c.top_count, identity["noise"]["tau"])
    except ValueError as e:
        return str(e)
    if (c.p_lower, c.radius) != (p_lower, radius):
        return f"p_lower {c.p_lower} and radius {c.radius}; the counts give {p_lower} and {radius}"
    if (c.predicted is None) != (p_lower <= 0.5):
        return "it abstains or predicts against its bound"
    if procedure.target == "label" and c.predicted not in (None, c.label):
        return "the class tested is not the label"
    return ""
