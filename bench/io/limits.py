"""Bounds on untrusted input: regular files alone, limited in size and time."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import IO, TypeVar

from bench.errors import BenchError

MB = 2**20
RUN = 64 * MB  # maximum size of a run.json; a million images take 10 MB
CERTIFICATE = 10_000  # maximum bytes of a line of certificates.jsonl
UNPACKED = 512 * MB  # maximum size of a compressed file's contents; the certificates of a million images are 230 MB
GZIP = ".gz"

_T = TypeVar("_T")


def contents(path: Path, most: int, fix: str = "the limit for such a file; make it smaller") -> bytes:
    """Read a file. Raises BenchError where it is not regular or has more than ``most`` bytes, else OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may yield bytes without end, or block
        raise BenchError(f"{path}: not a regular file; replace it by a copy")
    with path.open("rb") as f:
        data = f.read(min(most, found.st_size) + 1)  # read() allocates a buffer of that size
    if len(data) > most:
        raise BenchError(f"{path}: larger than {most // MB} MB, {fix}")
    return data


def memory() -> int:
    """Return the bytes of memory available to this process: the machine's, or its container's limit if lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return machine


def lines(path: Path, longest: int) -> Iterator[bytes]:
    """Yield the lines of a file with their ends, uncompressed where its name ends in .gz.

    Raises BenchError where the file is not regular, a line is longer or a compressed file holds more than
    ``UNPACKED``; OSError where it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise BenchError(f"{path}: not a regular file; replace it by a copy")
    with gzip.open(path, "rb") if path.suffix == GZIP else path.open("rb") as f:
        number = size = 0
        while line := _next_line(f, longest):
            number, size = number + 1, size + len(line)
            if path.suffix == GZIP and size > UNPACKED:
                raise BenchError(f"{path}: holds more than {UNPACKED // MB} MB; get the file again")
            if len(line) > longest:
                raise BenchError(
                    f"{path}:{number}: a line of more than {longest:,} bytes, which bench does not write; "
                    f"delete the line or get the file again"
                )
            yield line


def _next_line(f: IO[bytes] | gzip.GzipFile, longest: int) -> bytes:
    try:
        return f.readline(longest + 1)
    except (EOFError, zlib.error) as e:  # gzip raises these and OSError where a file is cut off or damaged
        raise OSError(f"damaged: {e}") from None


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """Return the result of ``call``. Raises TimeoutError after ``seconds``; its thread is then abandoned.

    A limit on the complete call, since a server that sends a byte now and then never exceeds a read timeout.
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
        if done.done():  # raised by ``call``
            raise
        raise TimeoutError(f"no complete answer in {seconds:.0f} s") from None
