"""A defense that gives no sign of life for too long is named and ended, in Python or in C.

A thread watches the clock. First the main thread is interrupted by a signal, which ends Python code
and waits of the system; code that does not come back even then is ended with its process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from bench.errors import DefenseFault, note

GRACE = 10.0  # seconds from the signal to the end of the process


@dataclass
class _Watch:
    """What is waited for (innermost last), and since when."""

    seconds: float
    doing: list[tuple[str, str]] = field(default_factory=list)  # a defense and what it is asked for
    since: float = 0.0

    def overdue(self) -> float:
        """Seconds past the limit; negative within it, and where nothing is waited for."""
        return time.monotonic() - self.since - self.seconds if self.doing else -self.seconds

    def fault(self) -> DefenseFault:
        """What to tell the user."""
        name, doing = self.doing[-1]
        mend = "mend it, or give it longer with --timeout"
        return DefenseFault(f"no answer for {self.seconds:g} s {doing}; {mend}", name)


_watch: _Watch | None = None


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Within this context, no ``watched`` code may take more than ``seconds`` between two signs of life. 0: no limit.

    For the main thread. Ended by DefenseFault, or by exit code 2 after one line on stderr.
    """
    global _watch
    if not seconds:
        yield
        return
    _watch = watch = _Watch(seconds)
    over = threading.Event()

    def interrupt(_: int, __: FrameType | None) -> None:
        if watch.overdue() > 0:  # it may have come back meanwhile
            raise watch.fault()

    before = signal.signal(signal.SIGALRM, interrupt)
    threading.Thread(target=_observe, args=(watch, over, threading.main_thread().ident), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _watch = None
        signal.signal(signal.SIGALRM, before)


def _observe(watch: _Watch, over: threading.Event, main: int) -> None:
    while not over.wait(min(1.0, watch.seconds / 4)):
        if watch.overdue() > 0:
            signal.pthread_kill(main, signal.SIGALRM)
            if watch.overdue() > GRACE:
                note(f"{watch.fault()}; all certified before is kept")
                os._exit(2)


@contextmanager
def watched(defense: str, doing: str) -> Iterator[None]:
    """Time what ``defense`` does in this context; ``doing`` completes the sentence 'no answer for 9 s ...'."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.since = time.monotonic()
    watch.doing.append((defense, doing))
    try:
        yield
    finally:
        watch.doing.pop()
        watch.since = time.monotonic()


@contextmanager
def paused() -> Iterator[None]:
    """Within this context nobody is timed: the harness itself waits, for a download or another process."""
    watch = _watch
    if watch is None:
        yield
        return
    held, watch.doing = watch.doing, []
    try:
        yield
    finally:
        watch.since = time.monotonic()
        watch.doing = held


def alive() -> None:
    """A sign of life: the clock starts anew."""
    if _watch is not None:
        _watch.since = time.monotonic()
