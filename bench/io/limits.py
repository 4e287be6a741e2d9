"""What is taken in of files that anyone may have written: regular files, no larger than stated."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

from bench.errors import BenchError

MB = 2**20
RUN = 64 * MB  # bytes of a run.json; a million images take 10 MB
CERTIFICATE = 10_000  # bytes of a line of certificates.jsonl

_T = TypeVar("_T")


def contents(path: Path, most: int, mend: str = "the most that is read of such a file; make it smaller") -> bytes:
    """The bytes of a file. Raises BenchError where it is no file or has more than ``most`` bytes, else OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may give bytes for ever, or none
        raise BenchError(f"{path}: not a regular file; give a copy of what it holds")
    with path.open("rb") as f:
        data = f.read(min(most, found.st_size) + 1)  # a buffer of that size is made, whatever there is to read
    if len(data) > most:
        raise BenchError(f"{path}: larger than {most // MB} MB, {mend}")
    return data


def memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its container's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine


def lines(path: Path, longest: int) -> Iterator[bytes]:
    """The lines of a file with their ends, one at a time. Raises BenchError where it is no file or a line is longer."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BenchError(f"{path}: not a regular file; give a copy of what it holds")
    with path.open("rb") as f:
        number = 0
        while line := f.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise BenchError(f"{path}:{number}: a line of more than {longest:,} bytes; bench writes none such")
            yield line


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return what ``call`` returns. Raises TimeoutError where it takes longer; its thread is then left to end.

    A server that sends a byte now and then is never silent, so no timeout of a read ends it.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as e:
            done.set_exception(e)

    Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # its own
            raise
        raise TimeoutError(f"no whole answer in {seconds:.0f} s") from None
