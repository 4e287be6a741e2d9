"""Accuracy, abstention and ACR of certificates, with confidence intervals: pure functions of the record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.records.columns import NULL, column
from bench.records.record import Line
from bench.smoothing import bounds


@dataclass(frozen=True)
class Rate:
    """A share of images with its 95% Clopper-Pearson interval; ``count`` may be a mean over seeds."""

    count: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The metrics of a run: certified accuracy at each of ``radii``, abstention rate and average certified radius."""

    images: int
    radii: tuple[float, ...]
    certified_accuracy: tuple[Rate, ...]
    abstained: Rate
    acr: float

    def as_json(self) -> dict[str, Any]:
        """Return the metrics as run.json has them."""
        points = zip(self.radii, self.certified_accuracy, strict=True)
        return {
            "images": self.images,
            "certified_accuracy": [{"radius": r, **asdict(rate)} for r, rate in points],
            "abstained": asdict(self.abstained),
            "acr": self.acr,
        }


def earned(certificates: Sequence[Line]) -> NDArray[np.float64]:
    """Return the certified radius of each image; -1 where its prediction is wrong or withheld."""
    predicted, label = column(certificates, "predicted"), column(certificates, "label")
    return np.where(predicted == label, column(certificates, "radius"), -1.0)


def by_index(certificates: Sequence[Line]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the images by rising index, and what each has ``earned``."""
    indices = column(certificates, "index")
    order = indices.argsort()
    return indices[order], earned(certificates)[order]


def summarise(certificates: Sequence[Line], radii: Sequence[float], label: int | None = None) -> Summary:
    """Compute the metrics over all images, or over those of one ``label``.

    An image counts at a radius where it is predicted right with a certified radius of at least that.
    """
    kept = slice(None) if label is None else column(certificates, "label") == label
    radius = earned(certificates)[kept]
    total, ordered = len(radius), np.sort(radius)
    # Added in order: numpy's sum, and sum() from Python 3.12 on, give other last bits, and verify compares all of them.
    acr = float(radius[radius >= 0].cumsum()[-1]) / total if total and ordered[-1] >= 0 else 0.0
    return Summary(
        images=total,
        radii=tuple(radii),
        certified_accuracy=tuple(_rate(total - int(np.searchsorted(ordered, r)), total) for r in radii),
        abstained=_rate(int(np.sum(column(certificates, "predicted")[kept] == NULL)), total),
        acr=acr,
    )


def total(values: Iterable[float | None]) -> float | None:
    """Return the sum, or None where any value is not known."""
    known = list(values)
    return None if None in known else sum(v for v in known if v is not None)


def pooled(runs: Sequence[Sequence[Line]], radii: Sequence[float], label: int | None = None) -> list[Rate]:
    """Average a method's certified accuracy at each radius over its runs, one per seed, on the same images.

    Over all images, or over those of one ``label``.
    """
    found = [summarise(certificates, radii, label) for certificates in runs]
    rates = zip(*(f.certified_accuracy for f in found), strict=True)
    return [_mean_rate(seeds, found[0].images) for seeds in rates]


def pooled_abstention(runs: Sequence[Sequence[Line]]) -> Rate:
    """Average the share of images on which a method abstains over its runs, as ``pooled``."""
    return _mean_rate([summarise(certificates, []).abstained for certificates in runs], len(runs[0]))


def _mean_rate(seeds: Sequence[Rate], images: int) -> Rate:
    """Average a share of the same images over seeds, with 95% Clopper-Pearson limits at that mean.

    An image's mean over seeds lies in [0, 1], so it varies no more than a coin of the same mean: the limits are
    those of one seed's binomial count and cover more than 95% where seeds disagree. They are about these trained
    models on images like these, not about other seeds.
    """
    return _rate(sum(s.count for s in seeds) / len(seeds), images)


def _rate(count: float, total: int) -> Rate:
    return Rate(count, count / total if total else 0.0, *bounds.interval(count, total))
