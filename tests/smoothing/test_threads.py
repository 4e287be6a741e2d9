"""Work shared by threads: every item once, and an end as soon as one of them fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from bench.smoothing.threads import share_out


def items() -> Iterator[int]:
    """A generator, which raises if two threads advance it at once."""
    for i in range(200):
        time.sleep(1e-5)
        yield i


def test_every_item_is_done_once() -> None:
    done: list[tuple[str, int]] = []

    def work(worker: str, item: int) -> None:
        time.sleep(1e-5)
        done.append((worker, item))

    share_out(["a", "b", "c", "d"], items(), work)
    assert sorted(item for _, item in done) == list(range(200))
    assert len({worker for worker, _ in done}) > 1


def test_an_error_stops_the_others() -> None:
    failed, done = threading.Event(), list[int]()

    def work(worker: str, item: int) -> None:
        if worker == "broken":
            failed.set()
            raise ValueError("broken")
        failed.wait()
        time.sleep(1e-3)
        done.append(item)

    with pytest.raises(ValueError, match="broken"):
        share_out(["sound", "broken"], items(), work)
    assert len(done) < 100
