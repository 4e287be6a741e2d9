"""A defense that gives no sign of life for too long is named and ended, in Python or in C.

A thread watches the clock. First the main thread is interrupted by a signal, which ends Python code and waits of
the system; code that does not come back even then is ended with its process. Where votes are drawn in other threads,
the main thread only waits for them: the one that hangs is left to itself.
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
class _Waits:
    """What one thread waits for (innermost last), and since when."""

    since: float = 0.0
    doing: list[tuple[str, str]] = field(default_factory=list)  # a defense and what it is asked for


@dataclass
class _Watch:
    """All that is waited for, by thread."""

    seconds: float
    threads: dict[int, _Waits] = field(default_factory=dict)

    def mine(self) -> _Waits:
        """Of the calling thread, alive now."""
        waits = self.threads.setdefault(threading.get_ident(), _Waits())
        waits.since = time.monotonic()
        return waits

    def end(self) -> None:
        """The calling thread waits for one thing less."""
        waits = self.mine()
        if waits.doing:  # else it was given up
            waits.doing.pop()
        if not waits.doing:
            del self.threads[threading.get_ident()]

    def overdue(self) -> float:
        """Seconds past the limit of the thread that waits longest; negative within it, and where none waits."""
        longest = min((w.since for w in list(self.threads.values()) if w.doing), default=None)
        return -self.seconds if longest is None else time.monotonic() - longest - self.seconds

    def give_up(self) -> DefenseFault | None:
        """What to tell the user of the thread that is overdue, None where none is; then nothing is waited for."""
        overdue = time.monotonic() - self.seconds
        for waits in list(self.threads.values()):
            if waits.doing and waits.since < overdue:
                self.threads = {}
                name, doing = waits.doing[-1]
                mend = "mend it, or give it longer with --timeout"
                return DefenseFault(f"no answer for {self.seconds:g} s {doing}; {mend}", name)
        return None


_watch: _Watch | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
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
        if (fault := watch.give_up()) is not None:  # it may have come back meanwhile
            raise fault

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
                note(f"{watch.give_up()}; all certified before is kept")
                os._exit(2)


@contextmanager
def watched(defense: str, doing: str) -> Iterator[None]:
    """Time what ``defense`` does in this context; ``doing`` completes the sentence 'no answer for 9 s ...'."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.mine().doing.append((defense, doing))
    try:
        yield
    finally:
        watch.end()


@contextmanager
def paused() -> Iterator[None]:
    """Within this context nobody is timed: the harness itself waits, for a download or another process."""
    watch = _watch
    if watch is None:
        yield
        return
    waits = watch.mine()
    held, waits.doing = waits.doing, []
    try:
        yield
    finally:
        watch.mine().doing = held


def heartbeat() -> None:
    """A sign of life: the clock starts anew."""
    if _watch is not None:
        _watch.mine()
