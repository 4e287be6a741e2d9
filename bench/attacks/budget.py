"""What an attack may cost, known before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bench.attacks.pgd import by_gradient
from bench.attacks.session import Attacker, largest_cost


@dataclass(frozen=True)
class AttackCost:
    """The most passes, votes and seconds that an attack may take; seconds by timing this machine."""

    forwards: int
    backwards: int
    votes: int
    seconds: float


def estimate(attacker: Attacker) -> AttackCost:
    """Bound the cost of an attack on all of its images. Times one gradient and one block of votes."""
    settings, rebuilt = attacker.settings, attacker.rebuilt
    forwards, backwards, votes = (len(settings.indices) * c for c in largest_cost(settings))
    measured = rebuilt.certifier.measure(calibrate=False)
    vote = measured.block_seconds / rebuilt.run.task.block
    gradient = _gradient_seconds(attacker) if settings.white_box else 0.0
    # A gradient's seconds include its forward pass; searches run on one thread.
    at_once = measured.at_once / rebuilt.run.task.block if rebuilt.run.task.device.type == "cpu" else 1
    search = (forwards - backwards) * vote * at_once + backwards * gradient
    return AttackCost(forwards, backwards, votes, search + votes * vote)


def _gradient_seconds(attacker: Attacker) -> float:
    """Time one gradient, after one that warms up; per pass."""
    draws, index = attacker.settings.draws, attacker.settings.indices[0]
    around = attacker.around(index, "pgd", 0.0)
    slope, at = by_gradient(around, draws), around.x * 0
    with attacker.searching():
        slope(at)
        began = time.perf_counter()
        float(slope(at).sum())
        return (time.perf_counter() - began) / draws
