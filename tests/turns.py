"""Timing two things in turn, since seconds alone say little on a shared machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def paired(one: Callable[[], None], other: Callable[[], None], rounds: int) -> list[float]:
    """Ratios of seconds, the two in turn, after a warm-up of each."""
    one(), other()
    ratios = []
    for _ in range(rounds):
        ratios.append(seconds(one) / seconds(other))
    return ratios


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
