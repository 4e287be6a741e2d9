"""Findings of the checks that ``bench verify`` and ``bench doctor`` print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check: what it asks, and what is wrong (empty when nothing is)."""

    check: str
    problem: str = ""
