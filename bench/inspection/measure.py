"""Everything that ``bench inspect`` measures: each run on the same images, noise and directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from bench.inspection import cam, gradients, intervals
from bench.inspection.cam import Map, NoMap
from bench.inspection.copies import SEED, Copies
from bench.inspection.gradients import Gradients
from bench.inspection.intervals import Interval
from bench.inspection.landscape import POINTS, Landscape, landscape
from bench.inspection.numbers import MANIFOLD_RATIO, Number
from bench.inspection.score import Denoiser
from bench.inspection.subjects import Subject
from bench.models.arithmetic import deterministic
from bench.smoothing.noise import Noise

DRAWS = 8  # noisy copies of each image
PICTURED = 6  # images with pictures and a landscape; numbers are of all images
ROWS = 64  # images in a forward pass of a landscape, about

Values = NDArray[np.float64]  # one for each noisy copy


@dataclass(frozen=True)
class ImageResult:
    """What was measured on one image of one run."""

    index: int
    label: int
    values: dict[str, Values]  # key of a number -> one value a noisy copy; without a map no cam_iou, cam_correlation
    maps: list[Map]  # of the clean image, then of each noisy copy; empty where the run has no map
    landscape: Landscape | None  # None: not pictured


@dataclass(frozen=True)
class SubjectResult:
    """What was measured on one run."""

    subject: Subject
    layer: str  # of the Grad-CAM; empty without one
    grid: tuple[int, int] | None
    behind: bool  # the classifier is given other pixels than the noisy image
    no_map: str  # why there is no Grad-CAM; empty where there is
    images: list[ImageResult]

    def summary(self, number: Number) -> Interval:
        """Return a number of the run over its images."""
        if number is MANIFOLD_RATIO:
            return intervals.ratio(self._per_image("change_on"), self._per_image("change_off"))
        return intervals.mean(self._per_image(number.key), number.least, number.most)

    def _per_image(self, key: str) -> list[float]:
        """Return one value an image: the mean over its copies that have one."""
        kept = [v[np.isfinite(v)] for v in (image.values.get(key, np.array([])) for image in self.images)]
        return [float(v.mean()) if len(v) else float("nan") for v in kept]


@dataclass(frozen=True)
class Inspection:
    """The results of all runs, and the pixels of the pictured images."""

    results: list[SubjectResult]
    copies: list[Copies]
    denoiser: str

    @property
    def pictured(self) -> list[int]:
        """Places of the images with pictures."""
        return places(len(self.copies))


def places(count: int) -> list[int]:
    """Return the places of the pictured images among ``count``: evenly from the first to the last."""
    shown = min(PICTURED, count)
    return [i * (count - 1) // max(1, shown - 1) for i in range(shown)]


def inspect(
    subjects: Sequence[Subject], indices: Sequence[int], denoiser: Denoiser, progress: Callable[[int, int], None]
) -> Inspection:
    """Measure every run on the images; ``progress`` is called with (steps done, all steps)."""
    run = subjects[0].run
    pixels = torch.from_numpy(run.split.pixels(np.array(indices))).to(run.task.device)
    noise = Noise(SEED, run.plan.split)
    copies = [
        Copies(pixels[i], index, int(run.split.labels[index]), run.plan.sigma, DRAWS, noise)
        for i, index in enumerate(indices)
    ]
    shown = set(places(len(indices)))
    total = len(subjects) * (len(indices) + POINTS * len(shown))
    steps = iter(range(1, total + 1))

    def done() -> None:
        progress(next(steps), total)

    with deterministic():
        results = [_result(subject, copies, shown, denoiser, done) for subject in subjects]
    return Inspection(results, copies, denoiser.source)


def _result(
    subject: Subject, copies: Sequence[Copies], shown: set[int], denoiser: Denoiser, done: Callable[[], None]
) -> SubjectResult:
    target, behind, no_map = None, False, ""
    try:
        target, behind = subject.target(copies[0])
    except NoMap as e:
        no_map = str(e)

    def images() -> Iterator[ImageResult]:
        for place, one in enumerate(copies):
            found, mean_gradient = gradients.measure(subject.logits, one, denoiser)
            values = _values(found)
            maps: list[Map] = []
            if target is not None:
                maps = _maps(subject, target, one)
                pairs = np.array([cam.overlap(maps[0], noisy) for noisy in maps[1:]], np.float64)
                values |= {"cam_iou": pairs[:, 0], "cam_correlation": pairs[:, 1]}
            done()
            plane = landscape(subject.logits, one, mean_gradient, ROWS, done) if place in shown else None
            yield ImageResult(one.index, one.label, values, maps, plane)

    name, grid = ("", None) if target is None else (target.name, target.size)
    return SubjectResult(subject, name, grid, behind, no_map, list(images()))


def _values(found: Gradients) -> dict[str, Values]:
    return {f.name: getattr(found, f.name).double().cpu().numpy() for f in fields(found)}


def _maps(subject: Subject, target: cam.Target, copies: Copies) -> list[Map]:
    """Return the maps of the clean image and of its noisy copies, each of what the classifier is given."""
    clean = copies.clean.expand_as(copies.noisy)
    found: list[Map] = []
    for x, count in ((clean, 1), (copies.noisy, copies.count)):
        network, given = subject.seen(x, copies.draw())
        found += cam.maps(network, target, given[:count], copies.label)
    return found
