"""From what the user typed to fully specified work, every value checked before anything is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bench import bounds, registry, tensors
from bench.anytime import Anytime
from bench.base_sources import choose_base
from bench.cards import Card, load_card
from bench.errors import BenchError, unknown
from bench.interface import Defense, Schedule
from bench.objectives import OBJECTIVES
from bench.procedures import Fixed

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Plan:
    """One run: one defense, certified at one sigma with one seed."""

    card: Card
    preset: str
    base: str
    weights: Path | None  # a user's own: of the defense, or of the base where the defense has none
    defense: str
    cls: type[Defense]
    source: str  # sha256 of the defense's file
    config: Any
    sigma: float
    train_sigma: float
    objective: str  # gaussian is every trained defense's default
    examples: str
    procedure: Fixed | Anytime
    noise: str  # float or grid
    seed: int
    arguments: dict[str, Any]  # of make_plans, for this run alone


def make_plans(
    *,
    defenses: str,
    dataset: str,
    sigma: str = ".25",
    train_sigma: float | None = None,
    base: str | None = None,
    weights: str | Path | None = None,
    preset: str | None = None,
    examples: str | None = None,
    n0: int | None = None,
    n: int | None = None,
    alpha: float = 0.001,
    procedure: str = "fixed",
    target: str = "selected",
    noise: str = "grid",
    seed: str = "0",
    objective: str = "gaussian",
    settings: Sequence[str] = (),
) -> list[Plan]:
    """All runs a command asks for, in order. Raises BenchError naming the first value that cannot be."""
    given = dict(locals())
    card = load_card(dataset)
    preset = preset or card.preset
    if preset not in card.presets:
        raise unknown(f"preset of {card.name}", preset, card.presets)
    means = card.presets[preset]
    n0, n = means.n0 if n0 is None else n0, means.n if n is None else n
    made = _procedure(procedure, target, n0, n, alpha, card)
    if noise not in ("float", "grid"):
        raise unknown("--noise", noise, ("float", "grid"))
    if train_sigma is not None and train_sigma <= 0:
        raise BenchError(f"--train-sigma {train_sigma:g}: must be above 0")
    chosen = [name for name in registry.names() if defenses == "all"] or _words("--defense", defenses)
    loaded = {name: registry.load(name) for name in chosen}
    if objective != "gaussian":
        _check_objective(objective, loaded)
    configs = _configure(loaded, preset, card, settings)
    if weights is not None:
        weights = Path(weights)
        given["weights"] = str(weights)
        if len(loaded) > 1:
            raise BenchError(f"--weights {weights} are of one defense; --defense names {len(loaded)}")
        tensors.refuse_pickle(weights)
    base_name = choose_base(card, preset, base)
    own = {name: [s for s in settings if _meant_for(s, name, cls)] for name, (cls, _) in loaded.items()}
    plans = []
    for s, number in itertools.product(_numbers("--sigma", sigma, float), _numbers("--seed", seed, int)):
        if s <= 0:
            raise BenchError(f"--sigma {s:g}: must be above 0")
        if not 0 <= number < 2**63:
            raise BenchError(f"--seed {number}: must be a whole number from 0")
        for name, (cls, source) in loaded.items():
            plan = Plan(
                card=card,
                preset=preset,
                base=base_name,
                weights=weights,
                defense=name,
                cls=cls,
                source=source,
                config=configs[name],
                sigma=s,
                train_sigma=train_sigma or s,
                objective=objective,
                examples=examples or str(means.examples),
                procedure=made,
                noise=noise,
                seed=number,
                arguments=given | {"defenses": name, "sigma": repr(s), "seed": str(number), "settings": own[name]},
            )
            plans.append(plan)
    return plans


def _configure(
    loaded: dict[str, tuple[type[Defense], str]], preset: str, card: Card, settings: Sequence[str]
) -> dict[str, Any]:
    """Each defense's Config: its defaults, its preset, the card's epoch scale, then ``--set [defense.]key=value``.

    A bare key goes to every selected defense that has it, and must be known to one at least.
    """
    given: dict[str, dict[str, str]] = {name: {} for name in loaded}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise BenchError(f"--set {setting}: write key=value")
        owner, _, bare = key.rpartition(".")
        short = {registry.short_name(name): name for name in loaded}
        if owner and owner not in short:
            raise unknown("defense in --set", owner, short)
        names = [short[owner]] if owner else list(loaded)
        having = [name for name in names if bare in {f.name for f in fields(loaded[name][0].Config)}]
        if not having:
            keys = {f.name for name in names for f in fields(loaded[name][0].Config)}
            raise unknown(f"setting of {', '.join(names)}", bare, keys)
        for name in having:
            given[name][bare] = value
    return {name: configured(name, cls, preset, card, given[name]) for name, (cls, _) in loaded.items()}


def configured(name: str, cls: type[Defense], preset: str, card: Card, given: Mapping[str, Any]) -> Any:
    """A defense's Config: its defaults, its preset, the card's epoch scale, then what is given. Raises BenchError."""
    adapter = TypeAdapter(cls.Config)
    try:
        config = adapter.validate_python(cls.presets.get(preset, {}))
        # A preset of the defense's own is meant as written; its defaults are for a data set of digits' size.
        if isinstance(config, Schedule) and preset not in cls.presets:
            config = replace(config, epochs=config.epochs * card.presets[preset].epoch_scale)  # type: ignore[call-arg]
        values = {f.name: getattr(config, f.name) for f in fields(cls.Config)}
        if wrong := sorted(set(given) - set(values)):
            raise unknown(f"setting of {name}", wrong[0], values)
        return adapter.validate_python(values | dict(given))
    except ValidationError as e:
        first = e.errors()[0]
        raise BenchError(f"defense {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _meant_for(setting: str, name: str, cls: type[Defense]) -> bool:
    owner, _, bare = setting.partition("=")[0].rpartition(".")
    return owner in ("", registry.short_name(name)) and bare in {f.name for f in fields(cls.Config)}


def _procedure(kind: str, target: str, n0: int, n: int, alpha: float, card: Card) -> Fixed | Anytime:
    if kind not in ("fixed", "anytime"):
        raise unknown("--procedure", kind, ("fixed", "anytime"))
    if target not in ("selected", "label"):
        raise unknown("--target", target, ("selected", "label"))
    if n0 < 1:
        raise BenchError(f"--n0 {n0}: must be at least 1")
    if not 0 < alpha < 1:
        raise BenchError(f"--alpha {alpha:g}: must lie strictly between 0 and 1")
    made: Fixed | Anytime = Fixed(n0, n, alpha, target)  # type: ignore[arg-type]
    at_cap = alpha
    if kind == "anytime":
        radii = tuple(r for r in card.radii if r > 0)
        made = Anytime(n0, n, alpha, radii, target)  # type: ignore[arg-type]
        at_cap *= 1 - made.ville_share
    if n < (least := bounds.smallest_n(at_cap)):
        raise BenchError(f"--n {n}: too few votes for any certificate at alpha {alpha:g}; the smallest is --n {least}")
    return made


def _check_objective(objective: str, loaded: dict[str, tuple[type[Defense], str]]) -> None:
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    for name, (cls, _) in loaded.items():
        if cls.loss is not Defense.loss:
            raise BenchError(f"--objective {objective}: defense {name} has a loss of its own; run it without")


def _words(flag: str, text: str) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words:
        raise BenchError(f"{flag} is empty")
    return list(dict.fromkeys(words))


def _numbers(flag: str, text: str, kind: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [kind(w) for w in _words(flag, text)]
    except ValueError:
        raise BenchError(f"{flag} {text}: must be a number, or several with commas between") from None
