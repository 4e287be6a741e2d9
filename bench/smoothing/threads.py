"""Work done in several threads at once, which ends as soon as one of them fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch

PATIENCE = 5.0  # seconds that threads get to finish their blocks after an interrupt

Worker = TypeVar("Worker")
Item = TypeVar("Item")


def side_by_side(jobs: Sequence[Callable[[threading.Event], None]]) -> None:
    """Run each job in its own thread (a single job in this one), and raise what one of them raises.

    A job may check the event, which is set once another job has raised or the process is interrupted.
    """
    raised, over = list[BaseException](), threading.Event()

    def work(job: Callable[[threading.Event], None]) -> None:
        try:
            with torch.inference_mode():
                job(over)
        except BaseException as e:
            raised.append(e)
            over.set()

    if len(jobs) == 1:
        work(jobs[0])
    else:
        # Daemons, since one may hang: the process does not wait for them at exit.
        threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as e:  # Ctrl-C, or the watchdog
            raised.insert(0, e)
            over.set()
            ends = time.monotonic() + PATIENCE
            for thread in threads:
                thread.join(max(0.0, ends - time.monotonic()))
    if raised:
        raise raised[0]


def share_out(workers: Sequence[Worker], items: Iterable[Item], work: Callable[[Worker, Item], None]) -> None:
    """Call ``work`` once for each item; each worker has its own thread and takes the next item when it is free."""
    left, lock = iter(items), threading.Lock()

    def run(worker: Worker, over: threading.Event) -> None:
        while not over.is_set():
            with lock:
                item = next(left, None)
            if item is None:
                return
            work(worker, item)

    side_by_side([partial(run, worker) for worker in workers])
