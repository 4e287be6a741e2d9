"""Verify records, from here or published: audit, then certify images again (``bench verify``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError, one_line
from bench.process.console import ConsoleReporter
from bench.publishing import weights
from bench.publishing.reading import Place
from bench.records.findings import FAILED, NOT_VERIFIED, Finding, Redrawn, Verdict, verdict
from bench.records.record import Record, find_runs, read_run
from bench.records.verify import check_record
from bench.runs.redraw import CHECK, draw_again
from bench.runs.session import Session


@dataclass(frozen=True)
class Check:
    """How records are verified: the options of ``bench verify``."""

    deep: bool = False
    fresh: bool = False
    defense: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Verified:
    """A run with the findings on it.

    ``record`` is None where it could not be read; ``weights`` is "published" where images were certified with published
    weights. ``error`` says why a run among several was not checked to the end; the others are checked all the same.
    """

    path: Path
    place: Place
    record: Record | None
    findings: list[Finding]
    verdict: Verdict
    weights: str | None
    error: str = ""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.resolve().name

    def as_json(self, here: dict[str, Any]) -> dict[str, Any]:
        """Return the object that ``--json`` prints; ``here``: of ``environment.describe``."""
        return {
            "run": self.name,
            "source": self.place.source,
            "revision": self.place.revision,
            "identity": self.record and self.record.identity.sha256,
            "certificates": self.record and self.record.info.certificates_sha256,
            "verdict": self.verdict.verdict,
            "why": self.verdict.why,
            "images_certified_again": self.verdict.images,
            "equal_counts": self.verdict.exactly,
            "weights": self.weights,
            "certbench": here["certbench"],
            "commit": here["commit"],
            "findings": [{"check": f.check, "problem": f.problem} for f in self.findings],
        }


def verify(place: Place, device: torch.device, asked: Check) -> Iterator[Verified]:
    """Verify the run, or each run, of a place. Raises BenchError where a single run cannot be read or rebuilt."""
    paths = find_runs(place.path) or [place.path]
    for path in paths:
        record, used, error = None, None, ""
        findings: list[Finding] = []
        try:
            record = read_run(path)
            findings += check_record(path)
            if not any(f.problem for f in findings):
                again, used = _again(record, device, asked)
                findings += again
        except BenchError as e:
            if len(paths) == 1:
                raise
            error = str(e)
        found = verdict(findings)
        if error and found.verdict != FAILED:
            found = Verdict(NOT_VERIFIED, error)
        yield Verified(path, place, record, findings, found, used, error)


def _again(record: Record, device: torch.device, asked: Check) -> tuple[list[Finding], str | None]:
    """Certify images again; with published weights where there are some."""
    session = Session(device, record.path.parent, ConsoleReporter())

    def draw() -> list[Finding]:
        return list(draw_again(record, session, asked.deep, asked.defense, asked.base, asked.fresh))

    if (folder := weights.published(record)) is None:
        return draw(), None
    try:
        with weights.used_alone(folder):
            return draw(), "published"
    except BenchError:
        raise
    except Exception as e:  # weights of other shapes, or without what their training records
        problem = f"the published weights cannot be used: {one_line(e)}"
        return [Redrawn(CHECK, problem)], "published"
