"""Envelopes over sigma: for each radius the most accurate sigma, chosen on validation images and judged on test's.

The best of several sigmas *on test* is a number nobody can have: whoever deploys the defense has to choose its
sigma first. So a method has an envelope only where it was certified at the same two sigmas or more on both splits
(``bench run --split validation``), everything else alike; the choice is a function of the validation runs alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.io.files import digest
from bench.records import metrics
from bench.records.grouping import common, comparable_but_sigma, method_key, method_name, reach
from bench.records.record import Record
from bench.text import DASH

BySigma = dict[float, list[Record]]  # a method's runs at each sigma, one a seed


@dataclass(frozen=True)
class Point:
    """At one radius: the sigma chosen, and certified accuracy there, of validation and of test with its interval."""

    radius: float
    sigma: float
    validation: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One method: the sigmas it was chosen from, and a point for each radius within reach of one of them."""

    label: str
    sigmas: list[float]
    points: list[Point]


@dataclass(frozen=True)
class Envelope:
    """The test runs of one section at all sigmas; ``lacking``: methods of several sigmas without validation runs."""

    record: Record  # any of its test runs
    validation_images: int
    rows: list[Row]
    lacking: list[str]

    @property
    def heading(self) -> str:
        """What all its runs have in common, in one line."""
        return f"{self.record.identity.dataset}, envelope over sigma: {common(self.record)}"

    @property
    def note(self) -> str:
        """How sigma was chosen, or how it could be."""
        said = []
        if self.rows:
            said.append(
                f"Each radius at the sigma with the highest certified accuracy on {self.validation_images} validation "
                "images (of equals the smallest), which no test image had a part in; accuracy and 95% interval are of "
                "the test images."
            )
        if self.lacking:
            said.append(
                f"No envelope over sigma for {', '.join(self.lacking)}: a sigma picked on test images is no result. "
                "The same bench run with --split validation, same sigmas and seeds, makes the runs to pick it by."
            )
        return " ".join(said)


def find(records: Sequence[Record]) -> list[Envelope]:
    """One for each set of test runs that differ in sigma, method and seed alone, where a method has several sigmas."""
    families: dict[str, dict[str, list[Record]]] = {"test": defaultdict(list), "validation": defaultdict(list)}
    for record in records:
        if record.identity.split in families and not record.imported:
            families[record.identity.split][digest(comparable_but_sigma(record))].append(record)
    found = []
    for tests in families["test"].values():
        mates = [f for f in families["validation"].values() if _beside_split(f[0]) == _beside_split(tests[0])]
        # Of several sets of validation images the largest.
        most = max(mates, key=lambda f: (len(f[0].certificates), digest(comparable_but_sigma(f[0]))), default=[])
        chooser, several = _methods(most), {k: m for k, m in _methods(tests).items() if len(m) > 1}
        rows, lacking = [], []
        for key, test in several.items():
            validation = chooser.get(key, {})
            usable = [s for s in test if _seeds(test[s]) == _seeds(validation.get(s, []))]
            label = _label(test, [method_name(next(iter(m.values()))[0]) for m in several.values()])
            if len(usable) > 1:
                rows.append(_row(label, {s: test[s] for s in usable}, {s: validation[s] for s in usable}))
            else:
                lacking.append(label)
        if rows or lacking:
            images = len(most[0].certificates) if most else 0
            rows.sort(key=lambda row: ([-p.value for p in row.points], row.label))
            found.append(Envelope(tests[0], images, rows, sorted(lacking)))
    return found


def choose(validation: Mapping[float, Sequence[Record]], radius: float) -> tuple[float, float] | None:
    """The sigma with the highest certified accuracy at a radius, the smallest of equals, and that accuracy.

    None where the radius is out of every sigma's reach.
    """
    within = {s: _pooled(r, radius).value for s, r in validation.items() if radius <= reach(r[0])}
    return max(within.items(), key=lambda at: (at[1], -at[0]), default=None)


def columns(envelope: Envelope) -> pd.DataFrame:
    """The envelope as text, a row a method; a dash for a radius out of every sigma's reach."""
    shown: dict[str, list[str]] = {
        "defense": [row.label for row in envelope.rows],
        "chosen among": [", ".join(f"{s:g}" for s in row.sigmas) for row in envelope.rows],
    }
    for radius in envelope.record.info.radii:
        cells = []
        for row in envelope.rows:
            at = next((p for p in row.points if p.radius == radius), None)
            cells.append(f"{at.value:.1%} [{at.low:.1%}, {at.high:.1%}] at {at.sigma:g}" if at else DASH)
        shown[f"r = {radius:g}"] = cells
    return pd.DataFrame(shown)


def _row(label: str, test: BySigma, validation: BySigma) -> Row:
    points = []
    for radius in next(iter(test.values()))[0].info.radii:
        chosen = choose(validation, radius)
        if chosen:
            sigma, value = chosen
            rate = _pooled(test[sigma], radius)
            points.append(Point(radius, sigma, value, rate.value, rate.low, rate.high))
    return Row(label, sorted(test), points)


def _pooled(records: Sequence[Record], radius: float) -> metrics.Rate:
    """Certified accuracy at a radius over seeds."""
    return metrics.pooled([r.certificates for r in records], [radius])[0]


def _methods(records: Sequence[Record]) -> dict[str, BySigma]:
    """The runs of each method by sigma; a method trained at its sigma is the same method at another."""
    found: dict[str, BySigma] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda r: (r.identity.sigma, r.identity.seed or 0)):
        sigma, trained = record.identity.sigma, record.identity.train_sigma
        key = digest({"method": method_key(record), "train_sigma": None if trained == sigma else trained})
        found[key][sigma].append(record)
    # Two runs of one seed differ in what no method says, such as a training done twice: neither is the method.
    return {k: m for k, m in found.items() if all(len(_seeds(r)) == len(r) for r in m.values())}


def _seeds(records: Sequence[Record]) -> set[int | None]:
    return {r.identity.seed for r in records}


def _beside_split(record: Record) -> dict[str, Any]:
    return {k: v for k, v in comparable_but_sigma(record).items() if k not in ("split", "indices", "images")}


def _label(runs: BySigma, names: Sequence[str]) -> str:
    first = next(iter(runs.values()))
    name = method_name(first[0])
    if names.count(name) > 1:
        return f"{name} ({first[0].path.name.rpartition('-')[2]})"
    return name + (f" ({len(first)} seeds)" if len(first) > 1 else "")
