"""Locks of folders, each held by one process at a time and naming its holder."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import BenchError, one_line, shown

_MARKER = re.compile(rb"(\d{1,20})\n([\w.-]{1,255})")  # process and host, as filelock writes them without flock
_LARGEST = 1024  # bytes read of the file that names a lock's holder


def this_process() -> str:
    """Return the name of this process in messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class Lock:
    """The lock of a folder: a file ``.lock`` and, if ``named``, a file ``.lock-holder`` that names the holder.

    Where the file system has flock, the lock ends with its process. Elsewhere filelock falls back to a file that exists
    while the lock is held, and only a process on the same host can detect that the holder is dead.
    """

    def __init__(self, folder: Path, named: bool = True) -> None:
        self.file, self._holder = folder / ".lock", folder / ".lock-holder" if named else None
        self._lock = FileLock(self.file)

    def take(self) -> bool:
        """Take the lock if it is free; return whether it was.

        Raises BenchError where the file system has no locks, OSError where it cannot be written.
        """
        try:
            self._acquire(0)
        except Timeout:
            return False
        return True

    def wait(self) -> None:
        """Wait until the lock is free, and take it."""
        self._acquire(-1)

    def release(self) -> None:
        """Release the lock."""
        if self._holder:
            with suppress(OSError):
                self._holder.unlink()
        self._lock.release()

    def _acquire(self, timeout: float) -> None:
        try:
            with warnings.catch_warnings():  # on the fallback, which ``held_by`` reports where it matters
                warnings.simplefilter("ignore")
                self._lock.acquire(timeout=timeout)
        except NotImplementedError as e:  # filelock's older versions have no fallback
            raise BenchError(
                f"cannot lock {self.file.parent}: {one_line(e)}; use a folder on a file system with locks"
            ) from None
        if self._holder:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            with suppress(OSError):  # the name is only for messages
                self._holder.write_text(f"{this_process()} since {since}")

    def held_by(self) -> str:
        """Describe the lock's holder in brackets, as far as known, and how to remove a lock that may outlive it."""
        name = _read(self._holder).decode(errors="replace") if self._holder else ""
        if marker := _MARKER.match(_read(self.file)):
            name = f"process {int(marker[1])} on {marker[2].decode()} since {_written(self.file)}"
        elif _has_flock(self.file):
            return f" ({shown(name)})" if name else ""
        who = f"{shown(name)}; " if name else ""
        return (
            f" ({who}on this file system a killed process leaves its lock behind; if that process no longer runs: "
            f"rm {self.file})"
        )


def _has_flock(file: Path) -> bool:
    """Return whether the file system of a file has locks that end with their process."""
    try:
        with file.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True
    except OSError:
        return False
    return True


def _written(file: Path) -> str:
    """Return the time of a file's last change, in UTC."""
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:  # the lock was released meanwhile
        return "a moment ago"


def _read(file: Path) -> bytes:
    """Return the first bytes of a file; none where it cannot be read."""
    try:
        if not file.is_file():  # opening a pipe would block
            return b""
        with file.open("rb") as f:
            return f.read(_LARGEST)
    except OSError:
        return b""
