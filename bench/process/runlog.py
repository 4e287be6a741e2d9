"""The log of one run: what happened when, for people and for ``bench status`` in another terminal.

Until the identity is known, and with it the run's folder, the file lies beside the run folders; from then on
it is ``log.txt`` in the folder. Its writer holds a lock on it, by which a run under way is told from one that
was killed. Everything is written through the logger ``bench``. Imports no torch.
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
LARGEST = 2**24  # bytes of a log that are looked at, from its end: months, at a line every half a minute
PERIOD = 30.0  # seconds between two lines of progress
STARTED, CERTIFY = "started: ", "certify "  # by which bench status finds the last start, and the pace since

log = logging.getLogger("bench")
log.setLevel(logging.INFO)


class Reporter(Protocol):
    """Where a run says what it is doing."""

    def say(self, text: str) -> None:
        """One finished fact."""
        ...

    def training(self, what: str) -> Any:
        """A context whose value is called with (steps done, steps, loss)."""
        ...

    def certifying(self, what: str, total: int, done: int) -> Any:
        """A context whose value is called with (images done, correct so far)."""
        ...


class _Line(logging.Formatter):
    """Time in UTC, level, text; a traceback is indented, so that only a line of the log begins with a time."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")

    def formatException(self, ei: Any) -> str:
        return textwrap.indent(super().formatException(ei), "    ")


class RunLog(logging.Handler):
    """An open log file."""

    def __init__(self, file: Path) -> None:
        """Open ``file``, to append. Raises BenchError where it cannot be written or another process does."""
        super().__init__(logging.INFO)
        self.setFormatter(_Line("%(asctime)s %(levelname)s %(message)s"))
        self._broken = False
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.file, self._stream = file, _opened(file)
        except OSError as e:
            raise BenchError(f"cannot write {file}: {e.strerror}; choose another folder with --out") from None

    def move_into(self, folder: Path) -> None:
        """Go on in the folder's ``log.txt``, below what it holds."""
        old, kept, file = self._stream, self.file, folder / NAME
        try:
            self._stream, self.file = _opened(file), file
        except OSError as e:
            raise BenchError(f"cannot write {file}: {e.strerror}; choose another folder with --out") from None
        self._append(kept.read_text("utf-8", errors="replace"))
        kept.unlink(missing_ok=True)
        old.close()

    def write(self, text: str, level: int = logging.INFO) -> None:
        """Add a line."""
        self.handle(log.makeRecord(log.name, level, "", 0, text, (), None))

    def discard(self) -> None:
        """Remove the file: nothing happened that is worth keeping."""
        self.file.unlink(missing_ok=True)

    def emit(self, record: logging.LogRecord) -> None:
        self._append(self.format(record) + "\n")

    def _append(self, text: str) -> None:
        """Write ``text`` whole or not at all, so that a log which does not fit leaves the room to the certificates."""
        size, left = os.fstat(self._stream.fileno()).st_size, text.encode(errors="backslashreplace")
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as e:  # certificates are worth more than their log
            with suppress(OSError):  # a medium that fails altogether
                self._stream.truncate(size)
            if not self._broken:
                print(f"bench: the log {self.file} has gaps: {e.strerror}", file=sys.stderr)
            self._broken = True

    def close(self) -> None:
        self._stream.close()
        super().close()


def _opened(file: Path) -> FileIO:
    """The file, open to append, its lock held. Raises BenchError where another process holds it, or it is no file."""
    if file.is_symlink() or (file.exists() and not file.is_file()):  # a stranger's folder may lead elsewhere
        raise BenchError(f"{file} is a link or no file, through which nothing is written; move it away")
    stream = file.open("ab+", buffering=0)
    for _ in range(20):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # bench status may be looking
            time.sleep(0.05)
        except OSError:  # a file system without locks: bench status then shows no run as running
            break
    else:
        stream.close()
        raise BenchError(f"{file} is being written by another process{writer(file)}; wait for it, or stop it")
    size = os.fstat(stream.fileno()).st_size
    if size and os.pread(stream.fileno(), 1, size - 1) != b"\n":  # a line torn by a crash
        stream.write(b"\n")
    return stream


def signature() -> str:
    """What a line ends with that names this process as the writer of a log from there on."""
    return f"written by {this_process()}"


def tail(path: Path) -> bytes:
    """The last bytes of a log, at most ``LARGEST``. Raises BenchError where it is no file, else OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BenchError(f"{path}: not a regular file; give a copy of what it holds")
    with path.open("rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - LARGEST))
        return f.read(LARGEST)


def writer(file: Path) -> str:
    """Who writes a log, in brackets, as far as it says."""
    try:
        end = tail(file).decode(errors="replace")
    except (OSError, BenchError):
        return ""
    found = re.findall(r"^(\S+) INFO (?:.*, )?written by (process \d+ on \S+)$", end, re.MULTILINE)
    return f" ({shown(found[-1][1])} since {shown(found[-1][0])})" if found else ""


def is_locked(file: Path) -> bool:
    """Whether a living process writes the log ``file``, as far as this file system's locks tell."""
    try:
        if not file.is_file():  # to open a pipe would take for ever
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
    """Write what is logged into ``file`` while the context lasts, and how it ended; warnings are said, too."""
    handler, aloud = RunLog(file), _TerminalWarnings(reporter)
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
    log.addHandler(aloud)
    warnings.showwarning = show
    try:
        yield handler
    except KeyboardInterrupt:
        log.info("interrupted")
        raise
    except Exception as e:
        told = isinstance(e, BenchError) and e.__cause__ is None  # its message is all there is to say
        log.error("%s", e if isinstance(e, BenchError) else one_line(e), exc_info=not told)
        if isinstance(e, DefenseFault) and e.__cause__ is not None:  # else it is certbench's own finding
            e.args = (f"{e}; traceback in {handler.file}",)
        raise
    finally:
        warnings.showwarning = shown
        log.removeHandler(aloud)
        log.removeHandler(handler)
        handler.close()


class _TerminalWarnings(logging.Handler):
    """Says warnings to the person at the terminal."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(lambda record: record.levelno == logging.WARNING)  # errors end the command, which says them
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.say(record.getMessage())


class LoggingReporter:
    """A reporter of one run that is also written to its log; of training every half a minute."""

    def __init__(self, reporter: Reporter, write: Callable[[str], None]) -> None:
        self.terminal, self._write = reporter, write

    def say(self, text: str) -> None:
        self._write(text)
        self.terminal.say(text)

    @contextmanager
    def training(self, what: str) -> Iterator[Callable[[int, int, float], None]]:
        with self.terminal.training(what) as update:
            spoke = -math.inf

            def both(done: int, total: int, loss: float) -> None:
                nonlocal spoke
                update(done, total, loss)
                if time.monotonic() - spoke >= PERIOD:
                    spoke = time.monotonic()
                    note = "" if math.isnan(loss) else f", loss {loss:.3f}"
                    self._write(f"train {what}: {done} of {total}{note}")

            yield both

    def certifying(self, what: str, total: int, done: int) -> Any:
        return self.terminal.certifying(what, total, done)
