"""What the certificates of one run say: pure functions of the record, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from bench import bounds
from bench.columns import NULL, column
from bench.store import Line


def earned(certificates: Sequence[Line]) -> NDArray[np.float64]:
    """The certified radius of each image; -1 where it is predicted wrong or not at all, so that it holds nowhere."""
    predicted, label = column(certificates, "predicted"), column(certificates, "label")
    return np.where(predicted == label, column(certificates, "radius"), -1.0)


def by_index(certificates: Sequence[Line]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The images by rising index, and what each has ``earned``."""
    indices = column(certificates, "index")
    order = indices.argsort()
    return indices[order], earned(certificates)[order]


def summarise(certificates: Sequence[Line], radii: Sequence[float], label: int | None = None) -> dict[str, Any]:
    """Certified accuracy at each radius and abstention rate, each with its 95% Clopper-Pearson interval; ACR last.

    Over all images, or those of one ``label``. An image counts at a radius where it is predicted right with a
    certified radius of at least that.
    """
    kept = slice(None) if label is None else column(certificates, "label") == label
    radius = earned(certificates)[kept]
    total, ordered = len(radius), np.sort(radius)
    # One after the other: numpy's sum, and from Python 3.12 sum's, would have other last bits, and verify compares all.
    acr = float(radius[radius >= 0].cumsum()[-1]) / total if total and ordered[-1] >= 0 else 0.0
    return {
        "images": total,
        "certified_accuracy": [{"radius": r, **_share(total - int(np.searchsorted(ordered, r)), total)} for r in radii],
        "abstained": _share(int(np.sum(column(certificates, "predicted")[kept] == NULL)), total),
        "acr": acr,
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
    by_seed = _quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    below, above = math.hypot(max(0.0, mean - low), by_seed), math.hypot(max(0.0, high - mean), by_seed)
    return {"value": mean, "low": max(0.0, mean - below), "high": min(1.0, mean + above)}


@cache
def _quantile(freedom: int) -> float:
    """Student's t at 97.5%."""
    return float(t.ppf(0.975, freedom))


def _share(count: int, total: int) -> dict[str, Any]:
    low, high = bounds.interval(count, total)
    return {"count": count, "value": count / total if total else 0.0, "low": low, "high": high}
