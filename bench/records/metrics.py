"""What the certificates of one run say: pure functions of the record, with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.records.columns import NULL, column
from bench.records.record import Line
from bench.smoothing import bounds


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


def pooled(runs: Sequence[Sequence[Line]], radii: Sequence[float], label: int | None = None) -> list[dict[str, float]]:
    """Certified accuracy of one method at each radius: the mean over its runs, one a seed, on the same images.

    Over all images, or those of one ``label``. Each is a dictionary of value, low and high, as of ``_mean_share``.
    """
    found = [summarise(certificates, radii, label) for certificates in runs]
    shares = zip(*(f["certified_accuracy"] for f in found), strict=True)
    return [_mean_share(seeds, found[0]["images"]) for seeds in shares]


def pooled_abstention(runs: Sequence[Sequence[Line]]) -> dict[str, float]:
    """Share of images on which a method abstains: the mean over its runs, as ``pooled``."""
    return _mean_share([summarise(certificates, [])["abstained"] for certificates in runs], len(runs[0]))


def _mean_share(seeds: Sequence[dict[str, Any]], images: int) -> dict[str, float]:
    """Mean over seeds of a share of the same images, and 95% Clopper-Pearson limits at that mean.

    An image's mean over seeds lies in [0, 1], so it varies no more than a coin of the same mean: the limits are
    those of one seed's binomial count and cover more than 95% where seeds disagree. They are about these trained
    models on images like these, not about other seeds.
    """
    count = sum(s["count"] for s in seeds) / len(seeds)
    low, high = bounds.interval(count, images)
    return {"value": count / images if images else 0.0, "low": low, "high": high}


def _share(count: int, total: int) -> dict[str, Any]:
    low, high = bounds.interval(count, total)
    return {"count": count, "value": count / total if total else 0.0, "low": low, "high": high}
