"""Locks of folders: held by one process at a time, which is named to others."""

from __future__ import annotations

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
_LARGEST = 1024  # bytes read of who holds a lock


def _beside(locked: Path) -> Path:
    return locked.with_name(f".{locked.name.lstrip('.')}-holder")


def sign(locked: Path) -> None:
    """Name this process, in a file beside, as the holder of the lock on a file."""
    text = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC).isoformat(timespec='seconds')}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK  # what is there may be a link or pipe
    with suppress(OSError), open(os.open(_beside(locked), flags, 0o644), "w") as f:  # the name is a courtesy
        f.write(text)


def unsign(locked: Path) -> None:
    """Remove that file."""
    with suppress(OSError):
        _beside(locked).unlink()


def signed(locked: Path) -> str:
    """The holder of the lock on a file, in brackets; nothing where it is not known."""
    name = _read(_beside(locked)).decode(errors="replace")
    return f" ({shown(name)})" if name else ""


class Lock:
    """The lock of a folder: a file ``.lock``, and beside it, while it is held, one that names the holder.

    Where the file system has flock, the lock ends with its process. Elsewhere filelock falls back to a file that
    exists while the lock is held, and only a process of the same host can find out that the holder is dead.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".lock"
        self._lock = FileLock(self.file)

    def take(self) -> bool:
        """Take the lock if it is free. Raises BenchError where the file system has no locks at all, else OSError."""
        try:
            self._acquire(0)
        except Timeout:
            return False
        return True

    def wait(self) -> None:
        """Take the lock as soon as it is free."""
        self._acquire(-1)

    def release(self) -> None:
        """Let another process take it."""
        unsign(self.file)
        self._lock.release()

    def _acquire(self, timeout: float) -> None:
        try:
            with warnings.catch_warnings():  # of the fallback: it is reported where it matters, in ``held_by``
                warnings.simplefilter("ignore")
                self._lock.acquire(timeout=timeout)
        except NotImplementedError as e:  # filelock's older versions have no fallback
            raise BenchError(
                f"cannot lock {self.file.parent}: {one_line(e)}; use a folder on another file system"
            ) from None
        sign(self.file)

    def held_by(self) -> str:
        """Who holds the lock, in brackets and as far as known, and how to clear it where it may outlive its holder."""
        if marker := _MARKER.match(_read(self.file)):
            since = _written(self.file)
            return (
                f" (process {int(marker[1])} on {marker[2].decode()} since {since}; on this file system a lock "
                f"outlives a process that is killed: if that one no longer runs, remove {self.file})"
            )
        return signed(self.file)


def _written(file: Path) -> str:
    """When a file was last written, in UTC."""
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:  # released meanwhile
        return "a moment ago"


def _read(file: Path) -> bytes:
    """The beginning of a file; nothing where it cannot be read."""
    try:
        if not file.is_file():  # to open a pipe would take for ever
            return b""
        with file.open("rb") as f:
            return f.read(_LARGEST)
    except OSError:
        return b""
