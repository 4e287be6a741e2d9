"""The chances of false alarms and of missed losses of ``bench check``, computed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.records import paired

LEVEL = 0.01  # chance of a false alarm in any test of a baseline
CHURN = 0.1  # share of images that change by chance, for which power is shown
POWER = 0.8  # a loss counts as detectable at this chance


@dataclass(frozen=True)
class Detectable:
    """The smallest loss, in whole points, that is found with ``POWER`` where ``churn`` of the images change by chance.

    None: not even the largest loss is.
    """

    churn: float
    points: int | None


@dataclass(frozen=True)
class Sensitivity:
    """What tests on these numbers of images find and miss, at the first and strictest step of Holm's correction."""

    tests: int
    images: int
    false_alarm_at_most: float
    false_alarm: float
    seen: list[Detectable]


def sensitivity(images: Sequence[int], points: float) -> Sensitivity:
    """Compute the sensitivity of tests, one for each number of images.

    A false alarm needs a test that falls to the first step's level, so the sum of their chances bounds it.
    """
    level, least = LEVEL / len(images), min(images)
    return Sensitivity(
        tests=len(images),
        images=least,
        false_alarm_at_most=sum(paired.largest_size(n, level) for n in images),
        false_alarm=sum(paired.power(n, CHURN / 2, CHURN / 2, level, 0.0) for n in images),
        seen=[Detectable(churn, _detectable(least, churn, level, points)) for churn in (0.0, CHURN)],
    )


def _detectable(images: int, churn: float, level: float, points: float) -> int | None:
    for lost in range(1, 101 - round(100 * churn)):
        if paired.power(images, lost / 100 + churn / 2, churn / 2, level, points) >= POWER:
            return lost
    return None
