"""``bench.run``: the command ``bench run`` as a function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from bench.errors import BenchError, DefenseFault, note, unknown
from bench.options import RunOptions

if TYPE_CHECKING:
    from bench.records.record import Record

Words = str | Sequence[str]
Numbers = str | float | Sequence[float]
Settings = str | Sequence[str] | Mapping[str, Any]


class Options(TypedDict, total=False):
    """Options of ``bench run`` that have defaults, by their names in ``RunOptions``; see ``bench run --help``."""

    train_sigma: float | None
    base: str | PathLike[str] | None
    mean: Numbers | None
    std: Numbers | None
    weights: str | PathLike[str] | None
    preset: str | None
    split: str
    examples: str | int | None
    n0: int | None
    n: int | None
    alpha: float
    procedure: str
    target: str
    radii: Numbers | None
    noise: str
    arithmetic: Words
    seed: str | int | Sequence[int]
    objective: str
    settings: Settings
    search: Settings


def run(
    defense: str | PathLike[str] | Sequence[str],
    dataset: str | PathLike[str],
    sigma: Numbers = 0.25,
    *,
    out: str | PathLike[str] = "runs",
    device: str = "auto",
    **options: Unpack[Options],
) -> list[Record]:
    """Train (or load) defenses and certify them; resume what is unfinished, re-use what is finished.

    Args:
        defense: A name, ./file.py, "all", or several.
        dataset: A card's name or ./card.toml.
        sigma: Noise of the certificate in pixels of [0, 1], or several.
        out: Folder of run folders.
        device: auto, cpu, cuda or mps.
        **options: The other options of ``bench run``. Lists stand for commas, and mappings for settings:
            ``seed=[0, 1]``, ``settings={"rank": 4}``, ``search={"rank": [4, 16]}``.

    Returns:
        The record of each run, in order.

    Raises:
        BenchError: An option is wrong, or a run failed; the others are finished before.
    """
    asked = options_of({"defense": defense, "dataset": dataset, "sigma": sigma, **options})
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device, same_kind
    from bench.records.writer import check_writable
    from bench.runs.plan import make_plans
    from bench.runs.remarks import check_effects
    from bench.runs.session import Session

    plans = make_plans(asked)
    check_effects(plans)
    check_writable(Path(out))
    where = pick_device(device)
    records: list[Record] = []
    faults: list[DefenseFault] = []
    for outcome in Session(where, Path(out), ConsoleReporter(), devices=same_kind(where)).runs(plans):
        if isinstance(outcome, DefenseFault):
            faults.append(outcome)
            if len(plans) > 1:
                note(f"run {len(records) + len(faults)} of {len(plans)} failed, the others go on: {outcome}")
        else:
            records.append(outcome)
    if len(plans) == 1 and faults:
        raise faults[0]
    if faults:
        raise BenchError(f"{len(faults)} of {len(plans)} runs failed: {'; '.join(map(str, faults))}")
    return list({record.path: record for record in records}.values())  # plans may prove to be one run


def options_of(given: Mapping[str, Any]) -> RunOptions:
    """Return the options of ``bench run`` for values as a person types them.

    Raises BenchError naming the first wrong one.
    """
    known = {one.name: one for one in fields(RunOptions)}
    known["defense"] = known.pop("defenses")
    for name in given:
        if name not in known:
            raise unknown("option", name, known)
    converted: dict[str, Any] = {}
    for name, value in given.items():
        one = known[name]
        if one.default == ():
            converted[name] = list(_settings(name, value))
        elif value is None and one.default is not MISSING:
            converted[name] = None
        elif isinstance(one.default, float) or one.type in ("float | None", "int | None"):
            converted[name] = _number(name, value)
        else:
            converted[name] = _text(name, value, one.metadata["several"])
    return RunOptions.of({known[k].name: v for k, v in converted.items() if v is not None})


def _number(name: str, value: Any) -> int | float:
    """Return a number of Python's own; numpy's have a method for that."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise BenchError(f"{name}: {plain!r} is not a number")
    return plain


def _text(name: str, value: Any, several: bool) -> str:
    """Return a value as the command line has it: a list with commas between, where the option takes several."""
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping | bytes):
        if not several:
            raise BenchError(f"{name}: one value, not a list")
        return ",".join(_word(name, item) for item in value)
    return _word(name, value)


def _word(name: str, value: Any) -> str:
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool):
        return str(plain).lower()
    if not isinstance(plain, str | int | float | PathLike):
        raise BenchError(f"{name}: {plain!r} is neither text nor a number")
    return repr(plain) if isinstance(plain, float) else str(plain)


def _settings(name: str, value: Any) -> Iterable[str]:
    """Return ``key=value`` words: of a mapping of values or lists, of one word, or of several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [f"{key}={_text(f'{name}, {key}', item, True)}" for key, item in value.items()]
    items = list(value) if isinstance(value, Iterable) else [value]
    if all(isinstance(item, str) for item in items):
        return items
    raise BenchError(f'{name}: give "key=value", a list of such words, or a dictionary')
