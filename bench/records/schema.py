"""The schema of run.json: typed models that a record is validated into, once, when it is read or begun.

A record is untrusted input, and what reads it does not check it again: types, ranges and what one field demands of
another are checked here, so that no record ends in a traceback, an endless loop or exhausted memory. Whether a record
is true is checked by ``bench verify``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, WrapValidator
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError

from bench.data.sources import SPLIT
from bench.errors import one_line
from bench.io.files import digest
from bench.records.stored import (
    Amount,
    Number,
    Open,
    Positive,
    Radii,
    Share,
    Stored,
    Votes,
    Whole,
    parse_json,
    unchanged,
)
from bench.smoothing.anytime import Anytime
from bench.smoothing.fixed import Fixed
from bench.smoothing.procedures import procedure_of
from bench.smoothing.votes import MAX_VOTES, Target

SCHEMA = 3


class Sampling(Stored):
    """How votes are drawn and what they prove: a procedure's kind and all its constants."""

    kind: Literal["fixed", "anytime", "adaptive"]
    n0: Votes | None
    n: Votes
    alpha: Open
    radii: Annotated[list[Positive], Field(max_length=100)] = Field(default_factory=list)
    target: Target = "selected"
    # Of the anytime procedure: bounds within which its tables are small and soon made.
    calibration: Literal["exact", "ville"] = "ville"
    spending: Annotated[float, Field(gt=0, le=100), WrapValidator(unchanged)] = 1
    ville_share: Open = 0.5
    components: Annotated[int, Field(ge=1, le=1000)] = 1
    fastest: Votes = 1
    slowest: Annotated[float, Field(gt=0, le=1), WrapValidator(unchanged)] = 1
    futility: Share = 0
    step: Annotated[int, Field(ge=1, le=MAX_VOTES)] = 1
    growth: Annotated[float, Field(ge=0.005, le=1), WrapValidator(unchanged)] = 1

    @property
    def on_grid(self) -> bool:
        """Whether only the radii of a grid are certified."""
        return self.kind == "anytime" or bool(self.radii)


class NoiseKind(Stored):
    """The noise of the votes; ``tau`` is its total-variation distance from Gaussian noise, charged to the bound."""

    kind: Literal["float", "grid"]
    version: str | int | None = None  # compared only
    tau: Share = 0
    grid_version: str | int | None = None
    levels: int | None = None


class BaseIdentity(Stored):
    """What identifies a base classifier."""

    name: str
    sha256: str


class DefenseIdentity(Stored):
    """What identifies a trained defense; an imported log's name and hash."""

    name: str
    source: str
    config: dict[str, Any]
    weights: str | None
    parts: dict[str, Any]
    objective: str | None
    objective_constants: dict[str, Any] = Field(default_factory=dict)  # empty: those of its version
    arithmetic: list[str] = Field(default_factory=list)  # of the certified logits, other than float32
    training_arithmetic: list[str] = Field(default_factory=list)  # of forward passes in training, other than float32

    @property
    def trained(self) -> set[str]:
        """The hashes of all trained weights that it takes to rebuild it: its own, and those of shared parts."""
        # The other parts are inner defenses, and files, which are named by their own hash.
        shared = {
            v
            for k, v in self.parts.items()
            if isinstance(v, str) and not k.endswith(" inside") and not v.startswith(k[-8:])
        }
        return shared | ({self.weights} if self.weights else set())


class ImportedFrom(Stored):
    """The released log that a record was imported from."""

    format: str
    sha256: str


class Identity(Stored):
    """All that determines the certificates; None where an imported log does not state it."""

    dataset: str
    card: str | None
    split: Annotated[str, StringConstraints(pattern=SPLIT)]
    indices: Annotated[list[Whole], Field(min_length=1)]
    images: str | None
    base: BaseIdentity | None
    defense: DefenseIdentity
    train_sigma: Positive | None
    sigma: Positive
    noise: NoiseKind
    sampling: Sampling = Field(alias="procedure")
    bound: str
    seed: Whole | None
    block: list[Whole] | None = None
    dtype: str | None = None
    device: str | None = None
    imported: ImportedFrom | None = None

    @cached_property
    def sha256(self) -> str:
        """The hash of the JSON object, independent of the order of its keys."""
        return digest(self.as_json())

    @property
    def folder_suffix(self) -> str:
        """The end of the name of its run folder: the first 32 bits of the hash."""
        return f"-{self.sha256[:8]}"

    @cached_property
    def procedure(self) -> Fixed | Anytime:
        """The procedure; that of an adaptive log is the fixed one at its cap. Validated with the whole run.json."""
        return procedure_of({"procedure": self.sampling.as_json()})


class Environment(Stored):
    """The machine and its versions, which should not change a certificate; None where shards differ."""

    certbench: str | None = None
    commit: str | None = None
    python: str | None = None
    platform: str | None = None
    device: str | None = None
    cores: int | None = None
    threads: int | None = None
    packages: dict[str, str | None] | None = None
    workers: dict[str, int] | None = None


class BaseInfo(Stored):
    """How the base does on the certified images, and how it was made."""

    clean_correct: Whole | None = None
    images: Annotated[int, Field(ge=1)]
    before_probe: str = ""
    source: dict[str, Any] = Field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether only its architecture was used."""
        return self.source.get("kind") == "untrained"


class SearchResult(Stored):
    """One candidate of a search for settings."""

    values: dict[str, Any]


class DefenseInfo(Stored):
    """What tables say about a defense besides its identity."""

    family: str
    trains: str
    paper: str = ""
    access: str | None = None
    trained_elsewhere: list[str]
    commits: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any]
    search: list[SearchResult]
    weights_file: str | None
    weights_sha256: str | None = None  # of that file
    notes: list[str] = Field(default_factory=list)


class Cost(Stored):
    """What a finished run cost; None where it is not known."""

    train_seconds: Amount | None
    queries: Amount | None
    trainable_nominal: Amount | None
    trainable_updated: Amount | None
    trained_here: Amount | None
    trained_elsewhere: Amount | None
    step_forwards: Amount | None = None  # passes of an image in a training step; None: a loss of the defense's own
    step_backwards: Amount | None = None
    certify_seconds: Amount | None
    calibration_seconds: Amount | None = None
    votes: Annotated[int, Field(ge=1, lt=2**63)] | None
    base_forwards: Amount | None
    parameters: Amount | None
    flops_per_vote: Amount | None
    peak_memory: Amount | None


class Fingerprint(Stored):
    """The logits of a fixed block of the run's first image: what identifies the certified function."""

    index: Whole
    machine: Environment
    sha256: str
    classes: Annotated[list[Whole], Field(min_length=1, max_length=64)]
    logits: Annotated[list[Number], Field(min_length=1, max_length=64)]


class RunInfo(Stored):
    """run.json. Cost, metrics and the hash of the certificates are there once the run is complete."""

    version: Literal[3] = Field(alias="schema")
    status: str
    identity: Identity
    shard: str | None = None
    environment: Environment
    arguments: dict[str, Any]
    radii: Radii
    preset: str | None
    classes: list[str]
    data: dict[str, Any] = Field(default_factory=dict)
    base: BaseInfo | None
    defense: DefenseInfo
    flags: list[str] = Field(default_factory=list)
    fingerprint: Fingerprint | None = None
    audit: dict[str, Any] | None = None  # like shards and metrics: for readers of the file
    shards: list[dict[str, Any]] = Field(default_factory=list)
    certificates_sha256: str | None = None
    cost: Cost | None = None
    metrics: dict[str, Any] | None = None  # only verify compares it

    @property
    def complete(self) -> bool:
        """Whether every image was certified."""
        return self.status == "complete"

    @property
    def imported(self) -> bool:
        """Whether it was made from a released log."""
        return self.identity.imported is not None

    @property
    def base_sha256(self) -> str | None:
        """The hash of the base, before a linear probe was added to it; None where it is not known."""
        base = self.identity.base
        return None if base is None else (self.base.before_probe if self.base else "") or base.sha256

    @validator(mode="after")
    def _consistent(self) -> Self:
        """Check what one field demands of another."""
        identity, sampling = self.identity, self.identity.sampling
        counted = "imported" not in identity.model_fields_set
        _demand(counted or self.imported, "identity.imported: null; it says what the log was, or is not there")
        _demand(len(set(identity.indices)) == len(identity.indices), "identity.indices: an image is there twice")
        _demand(len({f"{r:g}" for r in self.radii}) == len(self.radii), "radii: two of them are printed alike")
        if counted:
            known = None not in (identity.base, self.base, identity.seed, sampling.n0)
            _demand(known, "identity: a run that is not imported has a base, a seed and an n0")
            _demand(sampling.kind != "adaptive", "identity.procedure: only an imported log is adaptive")
        else:
            usual = sampling.kind == "fixed" or (sampling.kind == "adaptive" and len(sampling.radii) <= 1)
            _demand(usual, "identity.procedure: an imported log is fixed, or adaptive with at most one radius")
        if self.complete:
            for name in ("cost", "metrics", "certificates_sha256"):
                _demand(name in self.model_fields_set, f"{name}: Field required")
            _demand(self.metrics is not None, "metrics: null")
            votes = self.cost and None not in (self.cost.votes, self.cost.certify_seconds)
            _demand(votes or (self.imported and self.cost), "cost: a finished run has counted its votes and seconds")
        try:
            _ = identity.procedure  # its constants, and no others
        except (KeyError, TypeError, ValueError) as e:
            _demand(False, f"identity.procedure: {one_line(e)}")
        return self


def _demand(met: object, problem: str) -> None:
    if not met:
        raise PydanticCustomError("record", "{problem}", {"problem": problem})


def started(identity: Identity, about: Mapping[str, Any]) -> RunInfo:
    """Return the run.json of a run that begins; ``about``: the other fields, JSON-able."""
    return RunInfo.of(
        {"schema": SCHEMA, "status": "started", "identity": identity.as_json(), **parse_json(json.dumps(about))}
    )
