"""What a run folder must say to be read: it may be anybody's, and what reads records does not look again.

Only types and what arithmetic needs are checked here, so that no record ends in a traceback, a loop without
end or more memory than there is. Whether a record is true is the question of ``bench verify``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import BenchError, one_line
from bench.records.columns import NULL, Columns
from bench.smoothing.procedures import procedure_of
from bench.smoothing.votes import MAX_VOTES

Whole = Annotated[int, Field(ge=0, lt=2**63)]
Votes = Annotated[int, Field(ge=1, le=MAX_VOTES)]
Amount = Annotated[float, Field(ge=0, le=1e30)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
Open = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Radii = Annotated[list[Amount], Field(min_length=1, max_length=100)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Procedure(_Part):
    kind: Literal["fixed", "anytime", "adaptive"]
    n0: Votes | None
    n: Votes
    alpha: Open
    target: Literal["selected", "label"] = "selected"
    radii: Annotated[list[Positive], Field(max_length=100)] = []
    # Of the anytime procedure: bounds within which its tables are small and soon made.
    ville_share: Open = 0.5
    components: Annotated[int, Field(ge=1, le=1000)] = 1
    fastest: Votes = 1
    slowest: Annotated[float, Field(gt=0, le=1)] = 1
    futility: Share = 0
    step: Annotated[int, Field(ge=1, le=MAX_VOTES)] = 1
    growth: Annotated[float, Field(ge=0.005, le=1)] = 1


class _Noise(_Part):
    kind: Literal["float", "grid"]
    tau: Share = 0


class _Base(_Part):
    name: str
    sha256: str


class _Defense(_Part):
    name: str
    source: str
    config: dict[str, Any]
    weights: str | None
    parts: dict[str, Any]
    objective: str | None
    arithmetic: list[str] = []


class _Imported(_Part):
    format: str
    sha256: str


class _Identity(_Part):
    dataset: str
    card: str | None
    split: str
    indices: Annotated[list[Whole], Field(min_length=1)]
    device: str | None = None
    images: str | None
    base: _Base | None
    defense: _Defense
    train_sigma: Positive | None
    sigma: Positive
    noise: _Noise
    procedure: _Procedure
    bound: str
    seed: Whole | None
    imported: _Imported | None = None


class _BaseCost(_Part):
    images: Annotated[int, Field(ge=1)]
    clean_correct: Whole | None = None
    before_probe: str = ""


class _Searched(_Part):
    values: dict[str, Any]


class _Made(_Part):
    family: str
    trains: str
    settings: dict[str, Any]
    search: list[_Searched]
    trained_elsewhere: list[str]
    weights_file: str | None


class _Cost(_Part):
    train_seconds: Amount | None
    certify_seconds: Amount | None
    calibration_seconds: Amount | None = None
    votes: Annotated[int, Field(ge=1, lt=2**63)] | None
    base_forwards: Amount | None
    queries: Amount | None
    trainable_nominal: Amount | None
    trainable_updated: Amount | None
    trained_here: Amount | None
    trained_elsewhere: Amount | None
    parameters: Amount | None
    flops_per_vote: Amount | None
    peak_memory: Amount | None


class _Fingerprint(_Part):
    index: Whole
    machine: dict[str, Any]
    sha256: str
    classes: Annotated[list[Whole], Field(min_length=1, max_length=64)]
    logits: Annotated[list[float], Field(min_length=1, max_length=64)]


class _Run(_Part):
    status: str
    identity: _Identity
    environment: dict[str, Any]
    arguments: dict[str, Any]
    radii: Radii
    preset: str | None
    classes: list[str]
    base: _BaseCost | None
    defense: _Made
    flags: list[str] = []
    fingerprint: _Fingerprint | None = None


class _Complete(_Run):
    cost: _Cost
    metrics: dict[str, Any]
    certificates_sha256: str | None


def check(info: dict[str, Any]) -> None:
    """Raise BenchError naming the first thing in a run.json that is not as bench writes it."""
    try:
        run = (_Complete if info.get("status") == "complete" else _Run).model_validate(info)
        _together(run)
        procedure_of(info["identity"])  # its constants, and no others
    except ValidationError as e:
        raise BenchError(_first(e)) from None
    except (KeyError, TypeError, ValueError) as e:
        raise BenchError(f"identity.procedure: {one_line(e)}") from None


class _Method(_Part):
    name: str
    config: dict[str, Any]
    searched: list[str]
    objective: str | None
    train_sigma: Positive | None
    seed: Whole


class _Comparable(_Part):
    base: _Base
    procedure: _Procedure


class _Sources(_Part):
    sha256: str
    source: str
    weights: str | None
    parts: dict[str, Any]


class _Machine(_Part, extra="forbid"):
    device: Any
    platform: Any
    packages: Any
    threads: Any


class _EntryCost(_Part, extra="forbid"):
    votes: Annotated[int, Field(ge=1, lt=2**63)]
    forwards_per_vote: Amount | None
    parameters: Amount | None
    trained_here: Amount | None
    flops_per_vote: Amount | None
    vote_in_calibrations: Amount | None


class _Entry(_Part):
    """What a baseline keeps of a run; an image is its index, certified radius, n and top_count."""

    name: str
    command: str
    method: _Method
    comparable: _Comparable
    identity: _Sources
    environment: _Machine
    radii: Annotated[list[Amount], Field(max_length=100)]
    cost: _EntryCost
    images: Annotated[list[tuple[Whole, Amount | None, Votes, Whole]], Field(min_length=1)]


def check_entries(entries: list[Any]) -> None:
    """Raise BenchError naming the first thing in a baseline's entries that is not as bench writes it."""
    try:
        for entry in entries:
            _Entry.model_validate_json(json.dumps(entry))  # as JSON, where a list may be a tuple
    except ValidationError as e:
        raise BenchError(_first(e)) from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _together(run: _Run) -> None:
    """What one field demands of another."""
    identity = run.identity
    procedure, counted = identity.procedure, "imported" not in identity.model_fields_set
    if not counted and identity.imported is None:
        raise BenchError("identity.imported: null; it says what the log was, or is not there")
    if len(set(identity.indices)) < len(identity.indices):
        raise BenchError("identity.indices: an image is there twice")
    if len({f"{r:g}" for r in run.radii}) < len(run.radii):
        raise BenchError("radii: two of them are printed alike")
    if counted and (identity.base is None or run.base is None or identity.seed is None or procedure.n0 is None):
        raise BenchError("identity: a run that is not imported has a base, a seed and an n0")
    if counted and procedure.kind == "adaptive":
        raise BenchError("identity.procedure: only an imported log is adaptive")
    if not counted and (procedure.kind == "anytime" or (procedure.kind == "adaptive" and len(procedure.radii) > 1)):
        raise BenchError("identity.procedure: an imported log has a fixed procedure, or an adaptive one of one radius")
    if counted and isinstance(run, _Complete) and None in (run.cost.votes, run.cost.certify_seconds):
        raise BenchError("cost: a run that is not imported has counted its votes and seconds")


def check_lines(lines: Columns[Any], counted: bool, classes: int) -> None:
    """Raise BenchError where certificates or claims hold what no image can have; ``classes`` 0: not known."""
    names = ["index", "label", "predicted", "votes"]
    names += ["n0", "n", "top_count", "runner_up", "runner_up_count"] if counted else []
    for name in names:
        values = lines.column(name)
        wrong = (values < 0) & (values != NULL)
        if counted and classes and name in ("label", "predicted"):
            wrong |= values >= classes
        if wrong.any():
            raise BenchError(f"image {lines.column('index')[wrong.argmax()]}: {name} is {values[wrong.argmax()]}")
    for name in ("radius", "seconds", *(["p_lower"] if counted else [])):
        values = lines.column(name)
        wrong = (np.abs(values) >= 1e30) | ((values < 0) & (name == "radius"))
        if wrong.any():
            raise BenchError(f"image {lines.column('index')[wrong.argmax()]}: {name} is {values[wrong.argmax()]}")
