"""In and out of distribution: what one trained defense certifies on several test parts of a data set.

The runs of a row have the same trained weights, base, sigma, noise and procedure, and the same seeds. Their images
differ, so shares are compared with tests and intervals for unpaired samples. Validation and training images are in no
such table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from bench.io.files import digest
from bench.records import metrics, unpaired
from bench.records.grouping import comparable_but_split, heading_of_splits, method_key, method_name, reach, table_radii
from bench.records.paired import LEVEL, holm
from bench.records.record import Record
from bench.text import DASH

ACROSS = 2  # splits besides the reference side by side: they fit into 100 columns


@dataclass(frozen=True)
class Difference:
    """Certified accuracy on a split less that on the reference, with its 95% interval; ``p`` is Holm's."""

    value: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether the test over all differences of the table finds it."""
        return self.p < LEVEL


@dataclass(frozen=True)
class Cell:
    """Certified accuracy of a method on a split at a radius, with its 95% interval."""

    split: str
    radius: float
    value: float
    low: float
    high: float
    difference: Difference | None = None  # None on the reference


@dataclass(frozen=True)
class Row:
    """One method, with its cells on each split."""

    label: str
    cells: list[Cell]

    def at(self, split: str, radius: float) -> Cell | None:
        """Return the cell of a split and radius; None where the method has no such run."""
        return next((c for c in self.cells if (c.split, c.radius) == (split, radius)), None)


@dataclass(frozen=True)
class Shift:
    """The methods that were certified on the reference split and on at least one other."""

    heading: str
    reference: str
    images: dict[str, int]  # split -> number of images, the reference first
    radii: list[float]  # within reach
    rows: list[Row]
    left_out: list[str]

    @property
    def title(self) -> str:
        """The heading of the table."""
        return f"Splits compared: {self.heading}"

    @property
    def tests(self) -> int:
        """The number of differences that were tested."""
        return sum(c.difference is not None for row in self.rows for c in row.cells)

    @property
    def note(self) -> str:
        """What the table shows, and what it cannot show."""
        return " ".join(
            [
                "A row is one trained defense on every split, with the same weights, base, noise and votes. The images "
                f"differ, so nothing is paired: differences to {self.reference} have Newcombe's 95% intervals, in "
                f"points, and *: significant by Fisher's exact test ({LEVEL:.0%} level, Holm's correction over all "
                f"{self.tests} differences). Where images of one split are copies of another's, as corruptions are, "
                "both are conservative. Neither accounts for the choice of domains or for training again.",
                *self.left_out,
            ]
        )

    def blocks(self) -> Iterator[tuple[float, list[str]]]:
        """Yield each radius with the splits besides the reference that are shown side by side."""
        others = list(self.images)[1:]
        for radius in self.radii:
            for start in range(0, len(others), ACROSS):
                yield radius, others[start : start + ACROSS]

    def cells(self) -> list[tuple[str, pd.DataFrame]]:
        """Format the tables: a row a method, a column a split and one for its difference; with the title of each."""
        found = []
        for radius, splits in self.blocks():
            shown = {"defense": [row.label for row in self.rows]}
            for split in (self.reference, *splits):
                cells = [row.at(split, radius) for row in self.rows]
                shown[f"{split}\n{self.images[split]:,} images"] = [_share(c) for c in cells]
                if split != self.reference:
                    shown[f"{split} less\n{self.reference}"] = [_difference(c) for c in cells]
            found.append((f"certified at r = {radius:g}", pd.DataFrame(shown)))
        return found


def _share(cell: Cell | None) -> str:
    return f"{cell.value:.1%}\n{100 * cell.low:.1f}-{100 * cell.high:.1f}" if cell else DASH


def _difference(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return DASH
    found = cell.difference
    mark = " *" if found.significant else ""
    return f"{100 * found.value:+.1f}{mark}\n{100 * found.low:+.1f} to {100 * found.high:+.1f}"


def find(records: Sequence[Record]) -> list[Shift]:
    """Find the methods that were certified on several test parts, one table for each setting."""
    settings: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.identity.split.partition("-")[0] == "test" and not record.imported:
            settings[digest(comparable_but_split(record))].append(record)
    found = [made for runs in settings.values() if (made := _shift(runs))]
    return sorted(found, key=lambda shift: shift.heading)


def _shift(records: Sequence[Record]) -> Shift | None:
    splits, left_out = _one_set_each(records)
    if len(splits) < 2:
        return None
    reference = next((name for name in ("test", "test-id") if name in splits), min(splits))
    names = [reference, *sorted(splits.keys() - {reference})]
    radii = [r for r in table_radii(records) if r <= reach(records[0])]
    methods = {name: _methods(splits[name]) for name in names}
    rows = []
    for key, own in methods[reference].items():
        others = {name: methods[name][key] for name in names[1:] if key in methods[name]}
        for name in [name for name, runs in others.items() if _trained(runs) != _trained(own)]:
            left_out.append(f"{_label(own)} on {name} is left out: its seeds or weights are not those on {reference}.")
            del others[name]
        if others:
            rows.append(_row(own, others, reference, radii))
    if not rows:
        return None
    used = {cell.split for row in rows for cell in row.cells}
    return Shift(
        heading=heading_of_splits(records[0]),
        reference=reference,
        images={name: len(splits[name][0].certificates) for name in names if name in used},
        radii=radii,
        rows=_corrected(sorted(rows, key=lambda row: ([-c.value for c in row.cells], row.label))),
        left_out=left_out,
    )


def _one_set_each(records: Sequence[Record]) -> tuple[dict[str, list[Record]], list[str]]:
    """Return the runs of each split on one set of images, the largest, and a remark where there are others."""
    sets: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        sets[record.identity.split][digest({"of": [record.identity.indices, record.identity.images]})].append(record)
    kept, remarks = {}, []
    for name, found in sets.items():
        key = max(found, key=lambda k: (len(found[k][0].certificates), k))
        kept[name] = found[key]
        if len(found) > 1:
            remarks.append(f"Runs on {len(found)} sets of {name} images: those on the largest are compared.")
    return kept, remarks


def _methods(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.identity.seed or 0):
        found[digest({"method": [*method_key(record), record.identity.train_sigma]})].append(record)
    # Two runs of one seed, such as a training done twice, are ambiguous: the method is dropped.
    return {key: runs for key, runs in found.items() if len({r.identity.seed for r in runs}) == len(runs)}


def _trained(runs: Sequence[Record]) -> list[object]:
    """Return what two splits must have in common: the seeds and, for each, the trained weights."""
    return [(r.identity.seed, r.identity.defense.weights, r.identity.defense.parts) for r in runs]


def _label(runs: Sequence[Record]) -> str:
    return method_name(runs[0]) + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")


def _row(own: Sequence[Record], others: dict[str, list[Record]], reference: str, radii: Sequence[float]) -> Row:
    n, cells = len(own[0].certificates), []
    first = metrics.pooled([r.certificates for r in own], radii)
    cells += [Cell(reference, r, p.value, p.low, p.high) for r, p in zip(radii, first, strict=True)]
    for name, runs in others.items():
        m = len(runs[0].certificates)
        second = metrics.pooled([r.certificates for r in runs], radii)
        for radius, p, q in zip(radii, first, second, strict=True):
            low, high = unpaired.difference_interval(p.count, n, q.count, m)
            difference = Difference(q.value - p.value, low, high, unpaired.fisher(p.count, n, q.count, m))
            cells.append(Cell(name, radius, q.value, q.low, q.high, difference))
    return Row(_label(own), cells)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Replace the p-values of all differences by Holm's."""
    adjusted = iter(holm([c.difference.p for row in rows for c in row.cells if c.difference]))
    return [
        replace(
            row,
            cells=[
                replace(c, difference=replace(c.difference, p=next(adjusted))) if c.difference else c for c in row.cells
            ],
        )
        for row in rows
    ]
