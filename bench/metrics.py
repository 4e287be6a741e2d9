"""What the certificates of one run say: pure functions of the record, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import t

from bench import bounds
from bench.store import Line


def holds(line: Line, radius: float) -> bool:
    """Whether the image is predicted correctly, without abstaining, with a certified radius of at least ``radius``."""
    return line.predicted == line.label and line.radius >= radius


def certified(certificates: Sequence[Line], radius: float) -> int:
    """How many images hold at ``radius``."""
    return sum(holds(c, radius) for c in certificates)


def summarise(certificates: Sequence[Line], radii: Sequence[float]) -> dict[str, Any]:
    """Certified accuracy at each radius and abstention rate, each with its 95% Clopper-Pearson interval; ACR last."""
    total = len(certificates)
    correct = [c for c in certificates if c.predicted == c.label]
    return {
        "images": total,
        "certified_accuracy": [{"radius": r, **_share(certified(certificates, r), total)} for r in radii],
        "abstained": _share(sum(c.predicted is None for c in certificates), total),
        "acr": sum(c.radius for c in correct) / total if total else 0.0,
    }


def total(values: Iterable[float | None]) -> float | None:
    """Their sum, None where any is not known."""
    known = list(values)
    return None if None in known else sum(v for v in known if v is not None)


def pool(points: Sequence[dict[str, Any]], total: int) -> dict[str, float]:
    """Mean and 95% interval of a share measured with several seeds on the same ``total`` images.

    What the images leave open (Clopper-Pearson at the mean) and what the seeds do (Student's t) are
    independent sources of error, added in squares. One seed: its Clopper-Pearson interval.
    """
    values = [float(p["value"]) for p in points]
    if len(values) == 1:
        return {k: float(points[0][k]) for k in ("value", "low", "high")}
    mean = statistics.fmean(values)
    low, high = bounds.interval(round(mean * total), total)
    by_seed = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    below, above = math.hypot(max(0.0, mean - low), by_seed), math.hypot(max(0.0, high - mean), by_seed)
    return {"value": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above)}


def _share(count: int, total: int) -> dict[str, Any]:
    low, high = bounds.interval(count, total)
    return {"count": count, "value": count / total if total else 0.0, "low": low, "high": high}
