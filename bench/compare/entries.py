"""Entries of a baseline: what it keeps of each finished run, typed and validated when read."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from bench.errors import BenchError
from bench.io.files import digest
from bench.options import command
from bench.records import grouping
from bench.records.record import Record
from bench.records.schema import BaseIdentity, Cost, NoiseKind, Sampling
from bench.records.stored import Amount, Positive, Stored, Whole
from bench.smoothing.votes import MAX_VOTES

# Where these agree, the same identity must give the same counts. Threads may change the order of a sum.
MACHINE = ("device", "platform", "packages", "threads")


class Method(Stored):
    """What identifies a method, and the seed of its run."""

    name: str
    config: dict[str, Any]
    searched: list[str]
    objective: str | None
    train_sigma: Positive | None
    seed: Whole


class Comparable(Stored):
    """What must agree for two runs to be comparable, besides the images (see ``grouping.comparable``)."""

    base: BaseIdentity
    noise: NoiseKind
    sampling: Sampling = Field(alias="procedure")


class Sources(Stored):
    """Hashes of the identity and of what it consists of."""

    sha256: str
    source: str
    weights: str | None
    parts: dict[str, Any]


class Machine(Stored, extra="forbid"):
    """The ``MACHINE`` of a run."""

    device: Any
    platform: Any
    packages: Any
    threads: Any


class EntryCost(Stored, extra="forbid"):
    """The costs that are compared; seconds in units of the calibration timed before them."""

    votes: Annotated[int, Field(ge=1, lt=2**63)]
    forwards_per_vote: Amount | None
    parameters: Amount | None
    trained_here: Amount | None
    flops_per_vote: Amount | None
    vote_in_calibrations: Amount | None


class Outcome(NamedTuple):
    """The outcome of one image; ``radius`` is None where its prediction is wrong or withheld."""

    image: Whole
    radius: Amount | None
    n: Annotated[int, Field(ge=0, le=MAX_VOTES)]  # 0: target "correct" stopped, since the class was wrong
    top_count: Whole


class Entry(Stored):
    """What a baseline keeps of a run."""

    name: str
    command: str
    method: Method
    comparable: Comparable
    identity: Sources
    environment: Machine
    radii: Annotated[list[Amount], Field(max_length=100)]
    cost: EntryCost
    images: Annotated[list[Outcome], Field(min_length=1)]

    @cached_property
    def sha256(self) -> str:
        """The hash of the entry, which shows edits by hand."""
        return digest(self.as_json())

    def certified(self, radius: float) -> int:
        """Count the images certified at a radius."""
        return sum(i.radius is not None and i.radius >= radius for i in self.images)

    def key(self, any_base: bool) -> dict[str, Any]:
        """Return what matches an entry to a run; ``any_base``: whatever the weights of its base."""
        comparable = self.comparable.as_json()
        comparable["noise"] = {k: v for k, v in comparable["noise"].items() if k != "grid_version"}
        if any_base:
            comparable["base"] = {k: v for k, v in comparable["base"].items() if k != "sha256"}
        return {**comparable, **self.method.as_json(), "indices": [outcome.image for outcome in self.images]}


def entry_of(record: Record) -> Entry:
    """Return what a baseline keeps of a finished run. Raises BenchError where a number is out of range."""
    try:
        return Entry.of(_fields(record))
    except BenchError as e:
        raise BenchError(f"{record.path}: {e}") from None


def _fields(record: Record) -> dict[str, Any]:
    identity, info = record.identity, record.info
    defense, searched = identity.defense, grouping.searched(record)
    comparable = grouping.comparable(record) | {"noise": identity.noise.as_json()}  # its version, to explain counts
    del comparable["indices"]  # those of the images below
    stored = identity.defense.as_json()
    return {
        "name": f"{grouping.method_name(record)}, {identity.dataset}, sigma {identity.sigma:g}, "
        f"seed {identity.seed}" + ("" if identity.split == "test" else f", {identity.split} images"),
        "command": command(info.arguments),
        "method": {
            "name": defense.name,
            "config": {k: v for k, v in defense.config.items() if k not in searched},
            "searched": sorted(searched),
            "objective": defense.objective,
            "train_sigma": identity.train_sigma,
            "seed": identity.seed,
            # Absent: plain float32, and the constants of the objective's version.
            **{k: stored[k] for k in ("arithmetic", "objective_constants") if k in stored},
        },
        "comparable": comparable,
        "identity": {
            "sha256": identity.sha256,
            **{"source": defense.source, "weights": defense.weights, "parts": defense.parts},
        },
        "environment": {k: getattr(info.environment, k) for k in MACHINE},
        "radii": [r for r in info.radii if r <= grouping.reach(record)],
        "cost": _cost(record.cost),
        "images": sorted(
            Outcome(c.index, c.radius if c.predicted == c.label else None, c.n, c.top_count) for c in record.counted
        ),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    """Return the costs that are compared."""
    votes, forwards, seconds, unit = cost.votes, cost.base_forwards, cost.certify_seconds, cost.calibration_seconds
    assert votes is not None and seconds is not None
    per_vote = seconds / votes / unit if unit else None
    return {
        "votes": votes,
        # Per vote, since an anytime procedure draws fewer votes by chance; rounded, as the record's total is.
        "forwards_per_vote": None if forwards is None else round(forwards / votes, 4),
        "parameters": cost.parameters,
        "trained_here": cost.trained_here,
        "flops_per_vote": cost.flops_per_vote,
        "vote_in_calibrations": None if per_vote is None else float(f"{per_vote:.3g}"),
    }
