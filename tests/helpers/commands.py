"""The command line called in process, and paths of what tests certify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
TINY = str(TESTS / "tiny.toml")


class Result(NamedTuple):
    code: int
    out: str
    err: str


Bench = Callable[..., Result]  # the fixture ``bench``: words of a command line to what it gave


def defense(name: str) -> str:
    """Path of one of the test defenses."""
    return str(TESTS / "helpers" / "defenses" / f"{name}.py")
