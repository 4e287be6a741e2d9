"""Errors a user can mend: shown as one line, without a traceback."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterable


class BenchError(Exception):
    """Wrong usage or a missing prerequisite: the message says what, and how to mend it. Exit code 2."""


class DefenseFault(BenchError):
    """A defense that does not do its part, or is out of memory: the other runs of a command go on without it."""

    def __init__(self, problem: str, defense: str = "") -> None:
        """``defense``: whose fault it is, empty where only a caller knows."""
        super().__init__(f"defense {defense}: {problem}" if defense else problem)
        self.defense = defense


class NotComparable(BenchError):
    """Records that must not be held against each other, with the reason. Exit code 3."""


class Interrupted(BenchError):
    """Ctrl-C, with what to do next. Exit code 130."""


def note(text: str) -> None:
    """Say in one line, on stderr and in the run's log, what was mended or is waited for."""
    text = shown(text)  # the name of a file may be no text at all
    logging.getLogger("bench").info(text)
    print(f"bench: {text}", file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Text that anyone may have written, on one line: what is not printable (escape sequences too) by its number."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The first line of an error, with its type where the message alone would not say what happened."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str]) -> BenchError:
    """The error for a name that is not among ``known``, with the nearest ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
    return BenchError(f"unknown {kind} {name!r}; {hint}")
