"""``bench compare``: which of two or more runs on the same images is better, by how much, and is it chance?

Every number comes from the records. Base and defense may differ, and the output lists which of their settings do;
everything else that decides a certified accuracy must agree, or nothing is compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.compare.differences import flatten, readable
from bench.errors import BenchError, NotComparable, note
from bench.io.files import digest
from bench.records import audit, grouping, metrics, paired
from bench.records.record import Line, Record, find_runs, read_run
from bench.records.schema import Identity

TOP = 5  # images shown each way
COSTS = ("train_seconds", "certify_seconds", "votes", "flops_per_vote", "trained_here")


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs; ``cost`` has the ``COSTS``."""

    run: str
    defense: str
    flags: list[str]
    cost: dict[str, float | None]


@dataclass
class PairedTest:
    """Two runs at one radius: shares of images certified by each, and images that only one certifies."""

    radius: float
    certified_first: float
    certified_second: float
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """What a run predicts for an image (None: it abstains), and the certified radius (None: it tested none)."""

    predicted: int | None
    radius: float | None


@dataclass(frozen=True)
class Lead:
    """An image on which one run's radius exceeds the other's."""

    index: int
    label: int
    lead: float
    ahead: Prediction
    behind: Prediction


@dataclass(frozen=True)
class Pair:
    """Two runs compared, by their place in the list of runs; cost ratios are the second's over the first's."""

    first: int
    second: int
    radii: list[PairedTest]
    first_ahead: list[Lead]
    second_ahead: list[Lead]
    cost_ratios: dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Runs compared in pairs.

    ``unknown``: fields that an imported run does not state; ``differs``: settings, with a value for each run.
    """

    setting: str
    runs: list[ComparedRun]
    unknown: list[str]
    differs: dict[str, list[Any]]
    pairs: list[Pair]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as ``--json`` prints it."""
        return asdict(self)


def groups(paths: Sequence[Path]) -> list[list[Path]]:
    """Return the lists of runs to compare: those given or, of a folder, its finished runs that are comparable.

    Runs of a folder that are left out are named in a note. Raises BenchError where nothing is left.
    """
    found = [(path, find_runs(path) if not (path / "run.json").exists() else []) for path in paths]
    if not any(inner for _, inner in found):
        return [list(paths)]  # ``compare`` reports what is wrong with each
    chosen: dict[str, list[Path]] = {}
    for path in dict.fromkeys(run for given, inner in found for run in inner or [given]):
        try:
            record = read_run(path)
            problem = audit.problem(record)
        except BenchError as e:
            problem = str(e)
        if problem:
            note(f"left out: {problem}")
            continue
        labels = [column.tolist() for column in _labels(record)]
        chosen.setdefault(digest([_must_agree(record.identity), labels]), []).append(path)
    for (alone,) in (runs for runs in chosen.values() if len(runs) == 1):
        note(f"left out: {alone}: no other run is on the same images with the same sigma, noise and procedure")
    several = [runs for runs in chosen.values() if len(runs) > 1]
    if not several:
        raise BenchError(f"{', '.join(map(str, paths))}: no two finished runs that are comparable")
    return several


def compare(paths: Sequence[Path]) -> Comparison:
    """Test all pairs of the runs at every radius of their table within reach.

    Raises NotComparable with the reason, and BenchError if a run cannot be read, is unfinished or does not hold.
    """
    if len(paths) < 2 or len({p.resolve() for p in paths}) < len(paths):
        raise BenchError("compare takes two or more different run folders")
    records = [read_run(path) for path in paths]
    for record in records:
        if problem := audit.problem(record):
            raise BenchError(problem)
    unknown = _check(records)
    radii = _radii(records)
    pairs = [_pair(records, i, j, radii) for i, j in itertools.combinations(range(len(records)), 2)]
    tests = [test for pair in pairs for test in pair.radii]
    for test, adjusted in zip(tests, paired.holm([test.p for test in tests]), strict=True):
        test.p_holm = adjusted
    settings = [_may_differ(r.identity) for r in records]
    keys = sorted({k for s in settings for k in s})
    return Comparison(
        setting=grouping.setting(records[0]),
        runs=[ComparedRun(str(r.path), grouping.method_name(r), r.flags, _costs(r)) for r in records],
        unknown=unknown,
        differs={k: values for k in keys if not _same(values := [s.get(k) for s in settings])},
        pairs=pairs,
    )


def _must_agree(identity: Identity) -> dict[str, Any]:
    """Return all that decides a certified accuracy except base and defense; None where not known."""
    found = {k: getattr(identity, k) for k in ("dataset", "split", "indices", "images", "sigma", "bound")}
    # The rest of the noise follows from its kind and the images' levels, but for its version: see _may_differ.
    return found | {"noise": identity.noise.kind} | flatten(identity.sampling.as_json(), "procedure.")


def _may_differ(identity: Identity) -> dict[str, Any]:
    """Return the rest of an identity, whose differences are listed.

    Versions of grid noise draw from one distribution; runs of two versions share no noise, even with one seed.
    """
    settled = {"dataset", "card", "split", "indices", "images", "sigma", "noise", "procedure", "bound"}
    rest = flatten({k: v for k, v in identity.as_json().items() if k not in settled})
    return rest if identity.noise.grid_version is None else rest | {"noise.grid_version": identity.noise.grid_version}


def _same(values: Sequence[Any]) -> bool:
    return all(v == values[0] for v in values)


def _check(records: Sequence[Record]) -> list[str]:
    """Return the fields that an imported record does not know. Raises NotComparable unless the others agree."""
    fields = [_must_agree(r.identity) for r in records]
    unknown, reasons = [], []
    for key in dict.fromkeys(k for f in fields for k in f):
        both = zip(records, fields, strict=True)
        known = [f.get(key) for r, f in both if not (r.imported and f.get(key, "") is None)]
        if len(known) < len(records):
            unknown.append(key)
        if not _same(known or [None]):
            reasons.append(_reason(key, [f.get(key) for f in fields]))
    if reasons:
        raise NotComparable(f"not comparable: {'; '.join(reasons)}")
    indices, labels = zip(*map(_labels, records), strict=True)
    if len(other := np.flatnonzero(np.any([row != labels[0] for row in labels], axis=0))):
        different = " and ".join(str(row[other[0]]) for row in labels)
        raise NotComparable(
            f"not comparable: image {indices[0][other[0]]} is labelled {different}: not the same images"
        )
    return unknown


def _labels(record: Record) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the images by rising index, and their labels."""
    indices, labels = (record.certificates.column(name) for name in ("index", "label"))
    order = indices.argsort()
    return indices[order], labels[order]


def _reason(key: str, values: Sequence[Any]) -> str:
    if key == "indices":
        common = set.intersection(*map(set, values))
        return f"images differ ({', '.join(str(len(v)) for v in values)}; {len(common)} are common to all)"
    return f"{key} is {' and '.join(map(readable, values))}"


def _radii(records: Sequence[Record]) -> list[float]:
    within = min(map(grouping.reach, records))
    radii = [r for r in grouping.table_radii(records) if r <= within]
    if not radii:
        raise NotComparable("not comparable: the runs' tables have no radius within reach in common")
    return radii


def _pair(records: Sequence[Record], i: int, j: int, radii: Sequence[float]) -> Pair:
    _, first = metrics.by_index(records[i].certificates)
    _, second = metrics.by_index(records[j].certificates)
    return Pair(
        first=i,
        second=j,
        radii=[_test(radius, first >= radius, second >= radius) for radius in radii],
        first_ahead=_leads(records[i], records[j]),
        second_ahead=_leads(records[j], records[i]),
        cost_ratios=_ratios(_costs(records[i]), _costs(records[j])),
    )


def _test(radius: float, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> PairedTest:
    images, only_first, only_second = len(first), int(np.sum(first & ~second)), int(np.sum(second & ~first))
    low, high = paired.score_interval(only_first, only_second, images)
    return PairedTest(
        radius=radius,
        certified_first=int(np.sum(first)) / images,
        certified_second=int(np.sum(second)) / images,
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / images,
        low=low,
        high=high,
        p=paired.mcnemar(only_first, only_second),
    )


def _leads(ahead: Record, behind: Record) -> list[Lead]:
    """Return the images with the largest lead in radius; a wrong or withheld prediction counts as radius 0."""
    indices, radii = metrics.by_index(ahead.certificates)
    lead = radii.clip(0) - metrics.by_index(behind.certificates)[1].clip(0)
    found = []
    for k in (-lead).argsort(kind="stable")[:TOP]:  # of equals, those of lower index
        if lead[k] > 0:
            lines = [(record, _line(record, int(indices[k]))) for record in (ahead, behind)]
            sides = (Prediction(c.predicted, None if r.stopped(c) else c.radius) for r, c in lines)
            found.append(Lead(lines[0][1].index, lines[0][1].label, float(lead[k]), *sides))
    return found


def _line(record: Record, index: int) -> Line:
    return record.certificates[record.certificates.place("index", index)]


def _costs(record: Record) -> dict[str, float | None]:
    return {k: getattr(record.cost, k) for k in COSTS}


def _ratios(first: dict[str, float | None], second: dict[str, float | None]) -> dict[str, float | None]:
    """Divide the second's costs by the first's; None where either is unknown or the first cost nothing."""
    pairs = {k: (first[k], second[k]) for k in COSTS}
    return {k: b / a if a and b is not None else None for k, (a, b) in pairs.items()}
