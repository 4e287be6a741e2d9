"""Training objectives (``--objective``): losses of a classifier under noise, by name.

Each adds the noise itself, so every trained defense can use any of them. Constants are the published ones; they depend
on the training noise level and on the card's shape where the paper says so. A step has all images of the batch, each in
as many copies as the objective takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench.training.objectives import catrs, macer, smoothadv, smoothmix
from bench.training.objectives.catrs import REFERENCE_SIGMA
from bench.training.objectives.method import (
    Copies,
    Cost,
    TrainingObjective,
    noisy,
    published,
    repeated,
    similar_dataset,
)
from bench.training.objectives.plain import (
    CONSISTENCY,
    CONSISTENCY_COPIES,
    DIGN_COPIES,
    DIGN_WEIGHT,
    STABILITY_WEIGHT,
    Plain,
    clean,
    consistency,
    consistency_constants,
    dign,
    gaussian,
    make_consistency,
    stability,
)

__all__ = [
    "CONSISTENCY",
    "CONSISTENCY_COPIES",
    "DIGN_COPIES",
    "DIGN_WEIGHT",
    "OBJECTIVES",
    "REFERENCE_SIGMA",
    "STABILITY_WEIGHT",
    "VERSIONS",
    "Copies",
    "Cost",
    "TrainingObjective",
    "clean",
    "consistency",
    "consistency_constants",
    "dign",
    "gaussian",
    "make",
    "noisy",
    "repeated",
    "similar_dataset",
    "stability",
]


@dataclass(frozen=True)
class Entry:
    """An objective of the table."""

    make: Callable[[tuple[int, ...], float, bool], TrainingObjective]  # of shape, sigma, and whether it is quick
    attacks: bool = False  # whether it needs gradients with respect to the image


def _published(name: str, released: Mapping[str, Sequence[TrainingObjective]]) -> Entry:
    return Entry(partial(published, name, released), any(one.attacks for row in released.values() for one in row))


def _plain(made: Plain) -> Entry:
    return Entry(lambda shape, sigma, quick: made)


OBJECTIVES: dict[str, Entry] = {
    "gaussian": _plain(Plain(gaussian, 1)),
    "stability": _plain(Plain(stability, 2)),
    "consistency": Entry(make_consistency),
    "dign": _plain(Plain(dign, 1 + DIGN_COPIES)),
} | {
    name: _published(name, released)
    for name, released in {
        "smoothadv": smoothadv.PGD,
        "smoothadv-ddn": smoothadv.DDN,
        "macer": macer.RELEASED,
        "smoothmix": smoothmix.RELEASED,
        "catrs": catrs.RELEASED,
    }.items()
}
# Raise an objective's version whenever weights trained with it would change: it is part of their identity.
VERSIONS = {
    "clean": 1,
    "gaussian": 1,
    "stability": 2,
    "consistency": 2,
    "dign": 1,
    "smoothadv": 1,
    "smoothadv-ddn": 1,
    "macer": 1,
    "smoothmix": 1,
    "catrs": 1,
}


def make(name: str, shape: tuple[int, ...], sigma: float, preset: str) -> TrainingObjective:
    """Return an objective with its constants.

    Args:
        name: One of ``OBJECTIVES``.
        shape: Of the images: channels, height, width.
        sigma: Noise level of training.
        preset: Of the run; the budget of ``quick`` is smaller than the published one.
    """
    return OBJECTIVES[name].make(shape, sigma, preset == "quick")
