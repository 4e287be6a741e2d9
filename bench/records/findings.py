"""Findings of the checks that ``bench verify`` and ``bench doctor`` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check: what it asks, and what is wrong (empty when nothing is)."""

    check: str
    problem: str = ""


@dataclass(frozen=True)
class Redrawn(Finding):
    """The check of ``bench verify`` that certifies images again: how many, and whether counts had to be equal.

    ``why``: the reason where none was.
    """

    images: int = 0
    exactly: bool = False
    why: str = ""


VERIFIED, NOT_VERIFIED, FAILED = "verified", "not verified", "failed"


@dataclass(frozen=True)
class Verdict:
    """What the checks of a record add up to.

    ``verified``: no check failed, and images were certified again. ``not verified``: no check failed, but no image was
    certified again; ``why`` says the reason. ``failed``: ``why`` is the first problem.
    """

    verdict: str
    why: str = ""
    images: int = 0  # certified again
    exactly: bool = False  # with equal counts; else by a two-sample test

    def __str__(self) -> str:
        if self.why:
            return f"{self.verdict}: {self.why}"
        how = "with equal counts" if self.exactly else "compared by a two-sample test"
        return f"{self.verdict}: {self.images} images certified again, {how}"


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Add up the checks of one record."""
    if failed := next((f for f in findings if f.problem), None):
        return Verdict(FAILED, f"{failed.check}: {failed.problem}")
    again = [f for f in findings if isinstance(f, Redrawn)]
    if again and again[0].images:
        return Verdict(VERIFIED, "", again[0].images, again[0].exactly)
    return Verdict(NOT_VERIFIED, again[0].why if again else "no image was certified again")
