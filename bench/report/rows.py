"""The numbers of a table, read from records: one row a run, or one a method with its seeds pooled."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from bench.io.files import digest
from bench.records import metrics
from bench.records.grouping import (
    abstentions_known,
    comparable,
    comparable_but_sigma,
    heading,
    method_name,
    reach,
    table_radii,
)
from bench.records.record import Record
from bench.smoothing.votes import Target


@dataclass(frozen=True)
class Share:
    """Certified accuracy at a radius, in [0, 1], with its 95% interval."""

    value: float
    low: float
    high: float
    spread: float = 0.0  # highest minus lowest of the seeds


@dataclass(frozen=True)
class Row:
    """What a table shows of one run or one method; None: not known. Field order is the column order of csv and json."""

    run: str
    defense: str
    seed: float | None
    certified: dict[float, Share]
    family: str
    trains: str
    extra_data: str
    images: float
    base_clean_accuracy: float | None
    abstained: float | None
    train_seconds: float | None
    certify_seconds: float | None
    votes: float | None
    flops_per_vote: float | None
    trainable_nominal: float | None
    trainable_updated: float | None
    trained_here: float | None
    trained_elsewhere: float | None
    parameters: float | None
    peak_memory: float | None
    acr: float
    flags: str
    seeds: int = 1

    def columns(self) -> dict[str, object]:
        """Return the columns of csv and json; a radius has three."""
        out: dict[str, object] = {}
        for name, value in vars(self).items():
            if name == "certified":
                for radius, share in self.certified.items():
                    key = f"certified_{radius:g}"
                    out |= {key: share.value, f"{key}_low": share.low, f"{key}_high": share.high}
            elif name != "seeds":
                out[name] = value
        return out


@dataclass(frozen=True)
class Method:
    """One row of a table and the runs pooled in it, one a seed."""

    label: str
    name: str  # without seeds and marks
    training: str  # settings of training that the name leaves out
    row: Row
    records: list[Record]
    level: frozenset[float]  # radii at which it is not significantly worse than the best; empty where all others are


@dataclass(frozen=True)
class Setting:
    """What all runs of a table have in common."""

    key: str  # of the table, unique
    section: str  # key of the tables that differ in sigma alone
    heading: str
    terms: str  # the heading without data set and sigma
    dataset: str
    split: str
    sigma: float
    images: int
    base: str
    radii: list[float]
    reach: float  # the largest radius that any image can be certified at
    grid_only: bool  # the procedure certifies at ``radii`` only
    target: Target  # the class that is tested
    noise: str
    n: int
    alpha: float
    preset: str | None
    classes: list[str]  # empty: not known
    imported: bool
    untrained_base: bool  # only its architecture was used

    @property
    def within(self) -> list[float]:
        """The radii of the table that an image can be certified at."""
        return [r for r in self.radii if r <= self.reach]

    def class_name(self, label: int) -> str:
        """Name a class, by its number where no name is known."""
        return str(self.classes[label]) if label < len(self.classes) else str(label)


def read_setting(records: Sequence[Record]) -> Setting:
    """Read what the runs of a table have in common."""
    record = records[0]
    identity, info = record.identity, record.info
    sampling, head = identity.sampling, heading(record)
    return Setting(
        key=digest(comparable(record)),
        section=digest(comparable_but_sigma(record)),
        heading=head,
        terms=head.partition(": ")[2],
        dataset=identity.dataset,
        split=identity.split,
        sigma=identity.sigma,
        images=len(identity.indices),
        base="not stated" if identity.base is None else identity.base.name,
        radii=table_radii(records),
        reach=reach(record),
        grid_only=sampling.on_grid,
        target=sampling.target,
        noise=identity.noise.kind,
        n=sampling.n,
        alpha=sampling.alpha,
        preset=info.preset,
        classes=info.classes,
        imported=record.imported,
        untrained_base=info.base is not None and info.base.untrained,
    )


def read_row(record: Record, radii: Sequence[float]) -> Row:
    """Read the row of one run; accuracies at the table's ``radii`` are recomputed from its certificates."""
    info, cost, base = record.info, record.cost, record.info.base
    found = metrics.summarise(record.certificates, radii)
    return Row(
        run=record.path.name,
        defense=method_name(record),
        seed=record.identity.seed,
        certified={
            r: Share(p.value, p.low, p.high) for r, p in zip(found.radii, found.certified_accuracy, strict=True)
        },
        family=info.defense.family,
        trains=info.defense.trains,
        extra_data=", ".join(info.defense.trained_elsewhere),
        images=found.images,
        base_clean_accuracy=None if base is None or base.clean_correct is None else base.clean_correct / base.images,
        abstained=found.abstained.value if abstentions_known(record) else None,
        train_seconds=cost.train_seconds,
        certify_seconds=cost.certify_seconds,
        votes=cost.votes,
        flops_per_vote=cost.flops_per_vote,
        trainable_nominal=cost.trainable_nominal,
        trainable_updated=cost.trainable_updated,
        trained_here=cost.trained_here,
        trained_elsewhere=cost.trained_elsewhere,
        parameters=cost.parameters,
        peak_memory=cost.peak_memory,
        acr=found.acr,
        flags="; ".join(record.flags),
    )


def pool(seeds: Sequence[Row], records: Sequence[Record]) -> Row:
    """Pool the seeds of one method: each number is the mean of those known, accuracies have intervals at the mean."""
    radii = list(seeds[0].certified)
    shares = metrics.pooled([r.certificates for r in records], radii)
    certified = {}
    for radius, share in zip(radii, shares, strict=True):
        values = [seed.certified[radius].value for seed in seeds]
        certified[radius] = Share(share.value, share.low, share.high, spread=max(values) - min(values))
    changes: Any = {"certified": certified, "seeds": len(seeds)}
    for one in fields(Row):
        known = [v for row in seeds if isinstance(v := getattr(row, one.name), int | float)]
        if known and one.name not in changes:
            changes[one.name] = statistics.fmean(known)
    return replace(seeds[0], **changes)


def ordered(rows: Sequence[Row]) -> list[int]:
    """Return the places of the rows by certified accuracy at the grid's radii, the best first; ties by name."""
    return sorted(range(len(rows)), key=lambda i: ([-s.value for s in rows[i].certified.values()], rows[i].defense))
