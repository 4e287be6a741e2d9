"""A timeout for defenses that hang, in Python or in C.

A thread watches the clock. On a timeout it first interrupts the main thread by a signal, which ends Python code and
blocking system calls. If that does not help, it ends the process. Where votes are drawn in worker threads, the main
thread only waits for them; a worker that hangs is abandoned.
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

GRACE = 10.0  # seconds between the signal and the end of the process


@dataclass
class _Waits:
    """The calls a thread is waiting for, innermost last, and the time of its last heartbeat."""

    since: float = 0.0
    doing: list[tuple[str, str]] = field(default_factory=list)  # a defense, and what it is doing


@dataclass
class _Watch:
    """The waits of all threads, by thread id."""

    seconds: float
    threads: dict[int, _Waits] = field(default_factory=dict)

    def mine(self) -> _Waits:
        """Return the waits of the calling thread, with a heartbeat."""
        waits = self.threads.setdefault(threading.get_ident(), _Waits())
        waits.since = time.monotonic()
        return waits

    def end(self) -> None:
        """End the innermost wait of the calling thread."""
        waits = self.mine()
        if waits.doing:  # else the timeout removed it
            waits.doing.pop()
        if not waits.doing:
            del self.threads[threading.get_ident()]

    def overdue(self) -> float:
        """Return the seconds past the timeout of the longest wait; negative before it, and without any wait."""
        longest = min((w.since for w in list(self.threads.values()) if w.doing), default=None)
        return -self.seconds if longest is None else time.monotonic() - longest - self.seconds

    def give_up(self) -> DefenseFault | None:
        """Return the error for an overdue thread and end all waits; None where no thread is overdue."""
        overdue = time.monotonic() - self.seconds
        for waits in list(self.threads.values()):
            if waits.doing and waits.since < overdue:
                self.threads = {}
                name, doing = waits.doing[-1]
                fix = "fix it, or set a longer --timeout"
                return DefenseFault(f"no answer for {self.seconds:g} s {doing}; {fix}", name)
        return None


_watch: _Watch | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit ``watched`` code to ``seconds`` between two heartbeats while the context lasts; 0: no limit.

    For the main thread. A timeout raises DefenseFault there, or ends the process with exit code 2 and a line on stderr.
    """
    global _watch
    if not seconds:
        yield
        return
    _watch = watch = _Watch(seconds)
    over = threading.Event()

    def interrupt(_: int, __: FrameType | None) -> None:
        if (fault := watch.give_up()) is not None:  # None: it has returned meanwhile
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
                note(f"{watch.give_up()}; images certified before are kept")
                os._exit(2)


@contextmanager
def watched(defense: str, doing: str) -> Iterator[None]:
    """Apply the timeout to ``defense`` while the context lasts; ``doing`` completes "no answer for 9 s ..."."""
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
    """Suspend the calling thread's timeout while the harness itself waits, for a download or another process."""
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
    """Restart the calling thread's timeout."""
    if _watch is not None:
        _watch.mine()
