"""Timing two things in turn, since seconds alone say little on a shared machine."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]


def paired(
    one: Callable[[], object], other: Callable[[], object], rounds: int, clock: Clock = time.perf_counter
) -> list[float]:
    """Ratios of seconds, the two in turn, after a warm-up of each."""
    one(), other()
    return [seconds(one, clock) / seconds(other, clock) for _ in range(rounds)]


def seconds(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    began = clock()
    call()
    return clock() - began
