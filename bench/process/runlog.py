"""The log of one run, for people and for ``bench status`` in another terminal.

The log starts next to the run folders and moves into the run's folder, as ``log.txt``, once the identity, and with it
the folder, is known. Its writer holds a lock on it, so a running process can be distinguished from a killed one.
Everything is written through the logger ``bench``. Imports no torch.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import stat
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from bench.errors import BenchError, DefenseFault, one_line, shown
from bench.process.locks import this_process

NAME = "log.txt"
LARGEST = 2**24  # bytes read from the end of a log: months, at one line in 30 s
PERIOD = 30.0  # seconds between two lines of progress
STARTED, CERTIFY = "started: ", "certify "  # lines from which bench status reads the last start and the pace

log = logging.getLogger("bench")
log.setLevel(logging.INFO)


class Reporter(Protocol):
    """Shows the progress of a run."""

    def say(self, text: str) -> None:
        """Print one line."""
        ...

    def training(self, what: str) -> Any:
        """Return a context whose value is called with (steps done, all steps, loss)."""
        ...

    def certifying(self, what: str, total: int, done: int) -> Any:
        """Return a context whose value is called with (images done, correct so far)."""
        ...


class _Line(logging.Formatter):
    """Formats time in UTC, level and text; indents tracebacks, so only a log line begins with a time."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

    def formatException(self, ei: Any) -> str:
        return textwrap.indent(super().formatException(ei), "    ")


class RunLog(logging.Handler):
    """An open log file."""

    def __init__(self, file: Path) -> None:
        """Open ``file`` for appending. Raises BenchError where it is not writable or another process writes it."""
        super().__init__(logging.INFO)
        self.setFormatter(_Line("%(asctime)s %(levelname)s %(message)s"))
        self._broken = False
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.file, self._stream = file, _open_locked(file)
        except OSError as e:
            raise BenchError(f"cannot write {file}: {e.strerror}; choose another folder with --out") from None

    def move_into(self, folder: Path) -> None:
        """Append this log to the folder's ``log.txt`` and continue there."""
        old, kept, file = self._stream, self.file, folder / NAME
        try:
            self._stream, self.file = _open_locked(file), file
        except OSError as e:
            raise BenchError(f"cannot write {file}: {e.strerror}; choose another folder with --out") from None
        self._append(kept.read_text("utf-8", errors="replace"))
        kept.unlink(missing_ok=True)
        old.close()

    def write(self, text: str, level: int = logging.INFO) -> None:
        """Append a line."""
        self.handle(log.makeRecord(log.name, level, "", 0, text, (), None))

    def discard(self) -> None:
        """Delete the log of a run that did nothing."""
        self.file.unlink(missing_ok=True)

    def emit(self, record: logging.LogRecord) -> None:
        self._append(self.format(record) + "\n")

    def _append(self, text: str) -> None:
        """Write ``text`` completely or not at all: on a full disk the space is left to certificates."""
        size, left = os.fstat(self._stream.fileno()).st_size, text.encode(errors="backslashreplace")
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as e:  # a run goes on without its log
            with suppress(OSError):  # the disk may fail altogether
                self._stream.truncate(size)
            if not self._broken:
                print(f"bench: the log {self.file} is incomplete: {e.strerror}", file=sys.stderr)
            self._broken = True

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_locked(file: Path) -> FileIO:
    """Open a file for appending and lock it. Raises BenchError where it is locked, or not a regular file."""
    if file.is_symlink() or (file.exists() and not file.is_file()):  # a downloaded folder may link elsewhere
        raise BenchError(f"{file} is a link or not a regular file, so the log is not written to it; remove it")
    stream = file.open("ab+", buffering=0)
    for _ in range(20):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # bench status may be testing the lock
            time.sleep(0.05)
        except OSError:  # no locks on this file system: bench status then shows no run as running
            break
    else:
        stream.close()
        raise BenchError(f"{file} is being written by another process{writer(file)}; wait for it, or stop it")
    size = os.fstat(stream.fileno()).st_size
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":  # a crash left the last line incomplete
        stream.write(b"\n")
    return stream


def signature() -> str:
    """Return the end of a line that names this process as the log's writer."""
    return f"written by {this_process()}"


def tail(path: Path) -> bytes:
    """Read the last bytes of a log, at most ``LARGEST``. Raises BenchError for a pipe or device, else OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BenchError(f"{path}: not a regular file; replace it by a copy")
    with path.open("rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - LARGEST))
        return f.read(LARGEST)


def writer(file: Path) -> str:
    """Return the process that writes a log and since when, in brackets; empty where the log does not say."""
    try:
        end = tail(file).decode(errors="replace")
    except (OSError, BenchError):
        return ""
    found = re.findall(r"^(\S+) INFO (?:.*, )?written by (process \d+ on \S+)$", end, re.MULTILINE)
    return f" ({shown(found[-1][1])} since {shown(found[-1][0])})" if found else ""


def is_locked(file: Path) -> bool:
    """Return whether a running process writes the log; always False on a file system without locks."""
    try:
        if not file.is_file():  # opening a pipe would block
            return False
        with file.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def recording(file: Path, reporter: Reporter) -> Iterator[RunLog]:
    """Write the log to ``file`` while the context lasts, and how it ended; show warnings on the terminal too."""
    handler, terminal = RunLog(file), _TerminalWarnings(reporter)
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        handler.write(" ".join(str(message).split()), logging.WARNING)
        shown(message, category, filename, lineno, file, line)

    log.addHandler(handler)
    log.addHandler(terminal)
    warnings.showwarning = show
    try:
        yield handler
    except KeyboardInterrupt:
        log.info("interrupted")
        raise
    except Exception as e:
        complete = isinstance(e, BenchError) and e.__cause__ is None  # the message needs no traceback
        log.error("%s", e if isinstance(e, BenchError) else one_line(e), exc_info=not complete)
        if isinstance(e, DefenseFault) and e.__cause__ is not None:  # the defense raised it
            e.args = (f"{e}; traceback in {handler.file}",)
        raise
    finally:
        warnings.showwarning = shown
        log.removeHandler(terminal)
        log.removeHandler(handler)
        handler.close()


class _TerminalWarnings(logging.Handler):
    """Shows warnings on the terminal."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(lambda record: record.levelno == logging.WARNING)  # errors end the command, which prints them
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.say(record.getMessage())


class LoggingReporter:
    """A reporter that also writes to the run's log, of training one line in 30 s."""

    def __init__(self, reporter: Reporter, write: Callable[[str], None]) -> None:
        self.terminal, self._write = reporter, write

    def say(self, text: str) -> None:
        self._write(text)
        self.terminal.say(text)

    @contextmanager
    def training(self, what: str) -> Iterator[Callable[[int, int, float], None]]:
        with self.terminal.training(what) as update:
            last = -math.inf

            def both(done: int, total: int, loss: float) -> None:
                nonlocal last
                update(done, total, loss)
                if time.monotonic() - last >= PERIOD:
                    last = time.monotonic()
                    note = "" if math.isnan(loss) else f", loss {loss:.3f}"
                    self._write(f"train {what}: {done} of {total}{note}")

            yield both

    def certifying(self, what: str, total: int, done: int) -> Any:
        return self.terminal.certifying(what, total, done)
