"""Best-sigma curves: for each radius the most accurate sigma, chosen on validation images, measured on test images.

Each test part of a card has curves of its own.

Sigma must be chosen before a defense is deployed, so the best of several sigmas *on test images* is not attainable. A
method has a curve only if it was certified on both splits at the same sigmas, at least two (``bench run --split
validation``), with all else equal. The choice is a function of the validation runs alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.io.files import digest
from bench.records import metrics
from bench.records.grouping import common, comparable_but_sigma, method_key, reach, short_names, table_radii
from bench.records.record import Record
from bench.text import DASH

BySigma = dict[float, list[Record]]  # a method's runs at each sigma, one per seed


@dataclass(frozen=True)
class Point:
    """The sigma chosen at one radius, and certified accuracy there: on validation, and on test with its interval."""

    radius: float
    sigma: float
    validation: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One method: the sigmas to choose from, and a point for each radius within reach of one of them."""

    label: str
    sigmas: list[float]
    points: list[Point]

    def at(self, radius: float) -> Point | None:
        """Return the point of a radius; None where it is out of every sigma's reach."""
        return next((p for p in self.points if p.radius == radius), None)


@dataclass(frozen=True)
class Envelope:
    """The best-sigma curves of test runs that differ in sigma, method and seed alone."""

    section: str  # key of the tables with these runs
    heading: str
    split: str  # of the test images
    radii: list[float]
    validation_images: int
    curves: list[Curve]
    lacking: list[str]  # methods of several sigmas without the validation runs to choose by
    left_out: list[str]  # methods on test images of whose runs some have no validation run of their seed

    @property
    def note(self) -> str:
        """How sigma was chosen, or what is needed to choose it."""
        sentences = []
        if self.curves:
            sentences.append(
                "At each radius sigma is the one with the highest certified accuracy on "
                f"{self.validation_images} validation images (the smallest of equals). Accuracy and 95% interval are "
                f"of the {self.split} images."
            )
        if self.left_out:
            sentences.append(
                f"Left out: runs of {', '.join(self.left_out)} whose seed was not run on validation images too."
            )
        if self.lacking:
            sentences.append(
                f"No best-sigma curve for {', '.join(self.lacking)}: sigma must be chosen on validation images. "
                "Run again with --split validation and the same sigmas and seeds."
            )
        return " ".join(sentences)

    def cells(self) -> pd.DataFrame:
        """Format the curves, a row a method; a dash for a radius out of every sigma's reach.

        A cell has the value and its sigma above the interval.
        """
        shown: dict[str, list[str]] = {
            "defense": [curve.label for curve in self.curves],
            "chosen among": [", ".join(f"{s:g}" for s in curve.sigmas) for curve in self.curves],
        }
        for radius in self.radii:
            points = [curve.at(radius) for curve in self.curves]
            shown[f"r = {radius:g}"] = [
                f"{p.value:.1%} at {p.sigma:g}\n{100 * p.low:.1f}-{100 * p.high:.1f}" if p else DASH for p in points
            ]
        return pd.DataFrame(shown)


def find(records: Sequence[Record]) -> list[Envelope]:
    """Find the best-sigma curves of all methods with several sigmas on test images, by section."""
    families: dict[str, dict[str, list[Record]]] = {"test": defaultdict(list), "validation": defaultdict(list)}
    for record in records:
        kind = record.identity.split.partition("-")[0]
        if kind in families and not record.imported:
            families[kind][digest(comparable_but_sigma(record))].append(record)
    found = []
    for section, tests in families["test"].items():
        mates = [f for f in families["validation"].values() if _apart_from_split(f[0]) == _apart_from_split(tests[0])]
        # Of several sets of validation images the largest.
        most = max(mates, key=lambda f: (len(f[0].certificates), digest(comparable_but_sigma(f[0]))), default=[])
        if envelope := _envelope(section, tests, most):
            found.append(envelope)
    return found


def _envelope(section: str, tests: Sequence[Record], validation_runs: Sequence[Record]) -> Envelope | None:
    """Make the curves of one section; None where no method has several sigmas."""
    chooser, several = _methods(validation_runs), {k: m for k, m in _methods(tests).items() if len(m) > 1}
    names = [name for name, _ in short_names([next(iter(m.values()))[0] for m in several.values()])]
    curves, lacking, left_out = [], [], []
    for name, (key, test) in zip(names, several.items(), strict=True):
        both = _on_both(test, chooser.get(key, {}))
        if len(both) < 2:
            lacking.append(_label(name, names, test))
            continue
        used = {sigma: runs for sigma, (runs, _) in both.items()}
        label = _label(name, names, used)
        curves.append(_curve(label, table_radii(tests), used, {sigma: runs for sigma, (_, runs) in both.items()}))
        if any(len(test[sigma]) > len(runs) for sigma, runs in used.items()):
            left_out.append(label)
    if not several:
        return None
    curves.sort(key=lambda curve: ([-p.value for p in curve.points], curve.label))
    return Envelope(
        section=section,
        heading=f"{tests[0].identity.dataset}, best-sigma curve: {common(tests[0])}",
        split=tests[0].identity.split,
        radii=table_radii(tests),
        validation_images=len(validation_runs[0].certificates) if validation_runs else 0,
        curves=curves,
        lacking=sorted(lacking),
        left_out=sorted(left_out),
    )


def _on_both(test: BySigma, validation: BySigma) -> dict[float, tuple[list[Record], list[Record]]]:
    """Pair the runs of a method at each sigma: those on test and on validation images whose seed both have."""
    found = {}
    for sigma, runs in test.items():
        others = validation.get(sigma, [])
        seeds = _seeds(runs) & _seeds(others)
        if seeds:
            found[sigma] = (
                [r for r in runs if r.identity.seed in seeds],
                [r for r in others if r.identity.seed in seeds],
            )
    return found


def choose(validation: Mapping[float, Sequence[Record]], radius: float) -> tuple[float, float] | None:
    """Choose the sigma with the highest certified accuracy at a radius, the smallest of equals; with that accuracy.

    None where the radius is out of every sigma's reach.
    """
    within = {s: _pooled(r, radius).value for s, r in validation.items() if radius <= reach(r[0])}
    return max(within.items(), key=lambda at: (at[1], -at[0]), default=None)


def _curve(label: str, radii: Sequence[float], test: BySigma, validation: BySigma) -> Curve:
    points = []
    for radius in radii:
        chosen = choose(validation, radius)
        if chosen:
            sigma, value = chosen
            rate = _pooled(test[sigma], radius)
            points.append(Point(radius, sigma, value, rate.value, rate.low, rate.high))
    return Curve(label, sorted(test), points)


def _pooled(records: Sequence[Record], radius: float) -> metrics.Rate:
    """Certified accuracy at a radius over seeds."""
    return metrics.pooled([r.certificates for r in records], [radius])[0]


def _methods(records: Sequence[Record]) -> dict[str, BySigma]:
    """Sort runs by method and sigma; a method trained at the sigma it is certified at is one method at all sigmas."""
    found: dict[str, BySigma] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: (r.identity.sigma, r.identity.seed or 0)):
        sigma, trained = record.identity.sigma, record.identity.train_sigma
        key = digest({"method": method_key(record), "train_sigma": None if trained == sigma else trained})
        found[key][sigma].append(record)
    # Two runs of one seed, such as a training done twice, are ambiguous: the method is dropped.
    return {k: m for k, m in found.items() if all(len(_seeds(r)) == len(r) for r in m.values())}


def _seeds(records: Sequence[Record]) -> set[int | None]:
    return {r.identity.seed for r in records}


def _apart_from_split(record: Record) -> dict[str, Any]:
    return {k: v for k, v in comparable_but_sigma(record).items() if k not in ("split", "indices", "images")}


def _label(name: str, names: Sequence[str], runs: BySigma) -> str:
    if names.count(name) > 1:
        first = next(iter(runs.values()))
        return f"{name} ({first[0].path.name.rpartition('-')[2]})"
    fewest, most = (f(map(len, runs.values())) for f in (min, max))
    if most == 1:
        return name
    return f"{name} ({most} seeds)" if fewest == most else f"{name} ({fewest} to {most} seeds)"
