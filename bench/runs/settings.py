"""Turn ``--set`` and ``--search`` into the configurations of each defense."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bench import plugins
from bench.data.card import Card
from bench.errors import BenchError, unknown
from bench.interface import Defense, Schedule

Loaded = Mapping[str, tuple[type[Defense], str]]  # name -> class and sha256 of its source
Values = dict[str, str]  # one value of each key


@dataclass(frozen=True)
class Variant:
    """One configuration of a defense that a command asks for."""

    config: Any  # with a search: that of the first candidate
    settings: tuple[str, ...]  # --set of this variant alone
    search: tuple[str, ...]
    changed: dict[str, Any]  # the fields that --set gave another value than their default for the preset
    candidates: list[tuple[Values, Any]]  # searched values and the configuration they make; empty without a search


def variants(
    loaded: Loaded, preset: str, card: Card, settings: Sequence[str], search: Sequence[str]
) -> dict[str, list[Variant]]:
    """Make each defense's variants: one for every combination of the values that ``--set`` lists.

    A setting is ``[defense.]key=value[,value...]``. A bare key goes to every selected defense that has it, and
    must be known to at least one. Combinations with equal configurations are one variant.
    Raises BenchError naming the first invalid setting.
    """
    given, searched = _sort(loaded, "--set", settings), _sort(loaded, "--search", search)
    found: dict[str, list[Variant]] = {}
    for name, (cls, _) in loaded.items():
        if both := sorted(set(given[name]) & set(searched[name])):
            raise BenchError(f"--search {both[0]}: --set gives {name} a value of it too; leave one out")
        default = configured(name, cls, preset, card, {})
        owner = plugins.short_name(name)
        found[name] = []
        for values in _combinations(given[name]):
            candidates = [
                (c, configured(name, cls, preset, card, values | c)) for c in _combinations(searched[name]) if c
            ]
            config = candidates[0][1] if candidates else configured(name, cls, preset, card, values)
            changed = {k: getattr(config, k) for k in values if getattr(config, k) != getattr(default, k)}
            typed = tuple(f"{owner}.{k}={v}" for k, v in values.items())
            asked = tuple(f"{owner}.{k}={','.join(v)}" for k, v in searched[name].items())
            if all((config, candidates) != (v.config, v.candidates) for v in found[name]):
                found[name].append(Variant(config, typed, asked, changed, candidates))
    return found


def as_stored(variant: Variant, stored: Mapping[str, Any], folder: str) -> Variant:
    """Return the variant with the settings that a folder of weights states.

    Those that differ from the defense's own are named as with ``--set``, since they tell rows of a table apart.
    Raises BenchError where ``--set`` gives one of them another value.
    """
    given = {setting.partition("=")[0].rpartition(".")[2] for setting in variant.settings}
    other = {k: v for k, v in stored.items() if getattr(variant.config, k) != v}
    if wrong := [k for k in other if k in given]:
        raise BenchError(
            f"--set {wrong[0]}={getattr(variant.config, wrong[0])}: --weights {folder} have {wrong[0]}="
            f"{other[wrong[0]]}; leave --set {wrong[0]} out"
        )
    return replace(variant, config=replace(variant.config, **stored), changed=variant.changed | other)


def _combinations(lists: Mapping[str, list[str]]) -> Iterable[Values]:
    return (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def _sort(loaded: Loaded, flag: str, settings: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Sort the values by defense and key."""
    given: dict[str, dict[str, list[str]]] = {name: {} for name in loaded}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise BenchError(f"{flag} {setting}: write key=value")
        owner, _, bare = key.rpartition(".")
        short = {plugins.short_name(name): name for name in loaded}
        if owner and owner not in short:
            raise unknown(f"defense in {flag}", owner, short)
        names = [short[owner]] if owner else list(loaded)
        known = {name: {f.name for f in fields(loaded[name][0].Config)} for name in names}
        having = [name for name in names if bare in known[name]]
        if not having:
            raise unknown(f"setting of {', '.join(names)}", bare, set().union(*known.values()))
        for name in having:
            given[name][bare] = text.split(",")
    return given


def configured(name: str, cls: type[Defense], preset: str, card: Card, given: Mapping[str, Any]) -> Any:
    """Make a defense's Config: its defaults, its preset, the card's epoch scale, then ``given``. Raises BenchError."""
    adapter = TypeAdapter(cls.Config)
    try:
        config = adapter.validate_python(cls.presets.get(preset, {}))
        # A preset of the defense's own is meant as written; its defaults are for a data set of digits' size.
        if isinstance(config, Schedule) and preset not in cls.presets:
            config = replace(config, epochs=config.epochs * card.presets[preset].epoch_scale)  # type: ignore[call-arg]
        values = {f.name: getattr(config, f.name) for f in fields(cls.Config)}
        if wrong := sorted(set(given) - set(values)):
            raise unknown(f"setting of {name}", wrong[0], values)
        made = adapter.validate_python(values | dict(given))
    except ValidationError as e:
        first = e.errors()[0]
        raise BenchError(f"defense {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for key, value in vars(made).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BenchError(f"defense {name}: {key}: {value} is not a finite number")
    return made
