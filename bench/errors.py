"""Errors a user can fix: printed as one line, without a traceback."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterable


class BenchError(Exception):
    """Wrong usage or a missing prerequisite; the message says how to fix it. Exit code 2."""


class DefenseFault(BenchError):
    """A fault of one defense, such as a wrong result or too much memory; the command's other runs continue."""

    def __init__(self, problem: str, defense: str = "") -> None:
        """Name the problem.

        Args:
            problem: What is wrong, and how to fix it.
            defense: Name of the defense; a defense that raises this itself leaves it empty.
        """
        super().__init__(f"defense {defense}: {problem}" if defense else problem)
        self.defense = defense


class NotComparable(BenchError):
    """Records that cannot be compared, and the reason. Exit code 3."""


class Interrupted(BenchError):
    """Ctrl-C; the message says how to resume. Exit code 130."""


def note(text: str) -> None:
    """Print a remark in one line on stderr, and log it."""
    text = shown(text)  # a file's name may hold any bytes
    logging.getLogger("bench").info(text)
    print(f"bench: {text}", file=sys.stderr, flush=True)


def say_loading(what: str) -> None:
    """Tell a person at a terminal what takes the first seconds; scripts that read stderr get no such line."""
    if sys.stderr.isatty():
        print(f"bench: loading {shown(what)}", file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Escape what is not printable in untrusted text, such as line breaks and terminal sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str]) -> BenchError:
    """Return the error for a name that is not among ``known``, with the most similar ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}"
    return BenchError(f"unknown {kind} {name!r}; {hint}")
