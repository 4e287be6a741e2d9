"""Turn options into fully specified runs; every value is checked before anything is trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench import plugins
from bench.data.card import Card, split_names
from bench.data.datasets import load_card, whole_train
from bench.data.split import Split
from bench.errors import BenchError, unknown
from bench.interface import Access, Defense, Schedule
from bench.io import tensors
from bench.models import arithmetic
from bench.models.blueprints import GIVEN, Normalisation
from bench.models.names import choose_base, most_access
from bench.models.peft_folders import FolderWeights
from bench.models.served import is_url
from bench.options import RunOptions
from bench.runs.settings import Values, Variant, as_stored, variants
from bench.smoothing import bounds, gridnoise
from bench.smoothing.anytime import Anytime, calibration
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import MAX_VOTES, TARGETS
from bench.training import objectives
from bench.training.objectives import Cost, TrainingObjective

UNTRAINED = ("none", "training-free")  # kinds of defenses that train nothing, as they state it
SCHEDULE = frozenset(one.name for one in fields(Schedule))  # settings of training alone
MOST_RADII, LARGEST_RADIUS = 100, 1e30  # of a table, as its record may hold them
_Number = TypeVar("_Number", int, float)
Loaded = Mapping[str, tuple[type[Defense], str]]  # name -> class and hash of its source


@dataclass(frozen=True)
class Plan:
    """One run: one defense, certified at one sigma with one seed."""

    card: Card
    preset: str
    base: str
    normalisation: Normalisation | None  # --mean and --std of the base
    weights: Path | None  # the user's own: of the defense, or of the base where the defense has none
    defense: str
    cls: type[Defense]
    source: str  # sha256 of the defense's file
    config: Any
    changed: dict[str, Any]  # fields of config that --set gave another value than the preset's
    candidates: list[tuple[Values, Any]]  # of a search: the best on the validation split is taken
    sigma: float
    train_sigma: float
    objective: str  # gaussian is every trained defense's default
    split: str  # of the card; its images are certified
    examples: str
    radii: tuple[float, ...]  # of the run's table; the anytime procedure certifies at these alone
    procedure: Fixed | Anytime
    noise: str  # float or grid
    arithmetic: tuple[str, ...]  # how F is computed; empty: plain float32
    seed: int
    options: RunOptions  # of this run alone
    grid_version: str = gridnoise.VERSION  # of grid noise; a recorded run is rebuilt with the record's

    @property
    def training_objective(self) -> TrainingObjective:
        """The objective with its constants, for the card's images, the noise of training and the preset."""
        return objectives.make(self.objective, self.card.shape, self.train_sigma, self.preset)

    @property
    def training_arithmetic(self) -> Literal["float32", "bfloat16"]:
        """What the defense and its parts are trained in, where the harness's loop trains them."""
        return self.card.presets[self.preset].training_arithmetic

    @property
    def uses_objective(self) -> bool:
        """Whether the defense's training, if it has one, is by the objective."""
        return self.cls.uses_objective(self.config)

    @property
    def step_cost(self) -> Cost | None:
        """What an image costs in a training step; None where the defense has a loss of its own."""
        return self.training_objective.cost if self.uses_objective else None

    @property
    def from_scratch(self) -> bool:
        """Whether the base is the preset's ``scratch_base``, of which only the architecture is used."""
        own = self.card.presets[self.preset].scratch_base
        return self.cls.access is Access.NONE and bool(own) and not self.options.base

    def training_images(self, train: Split, validation: Split) -> Split:
        """Return the images that the defense is trained on: ``train``, or those of validation too.

        Those too, as the papers that train from scratch do, where nothing is chosen or certified on them, and no base
        was trained without them. ``found`` of the result says which.
        """
        few = self.card.presets[self.preset].train_examples
        if not self.from_scratch or few or self.weights or self.cls.kind(self.config) in UNTRAINED:
            return train
        if self.candidates or self.split == "validation":
            use = "that --search uses" if self.candidates else "that are certified"
            remark = f"trained on {len(train):,} images, without the {len(validation):,} of validation, {use}"
            return replace(train, found=f"{train.found}; {remark}")
        whole = whole_train(self.card, train, validation)
        added = len(whole) - len(train)
        remark = f"trained on {len(whole):,} images" + (f", the {added:,} of validation included" if added else "")
        return replace(whole, found=f"{train.found}; {remark}")


def make_plans(options: RunOptions) -> list[Plan]:
    """Make the runs that a command asks for, in order. Raises BenchError naming the first invalid value."""
    o = options
    card = load_card(o.dataset)
    preset = o.preset or card.preset
    if preset not in card.presets:
        raise unknown(f"preset of {card.name}", preset, card.presets)
    means = card.presets[preset]
    n0, n = means.n0 if o.n0 is None else o.n0, means.n if o.n is None else o.n
    radii = card.radii if o.radii is None else _radii(o.radii)
    procedure = make_procedure(o.procedure, o.target, n0, n, o.alpha, radii)
    if o.split not in split_names(card):
        raise _no_split(card, o.split)
    if o.noise not in ("float", "grid"):
        raise unknown("--noise", o.noise, ("float", "grid"))
    words = arithmetic.parse(o.arithmetic)
    if o.train_sigma is not None and not 0 < o.train_sigma < math.inf:  # NaN is not
        raise BenchError(f"--train-sigma {o.train_sigma:g}: must be a number above 0")
    chosen = [name for name in plugins.names() if o.defenses == "all"] or _words("--defense", o.defenses)
    loaded = {name: plugins.load(name) for name in chosen}
    if o.defenses == "all" and not (o.base or means.transfer_base):
        loaded = {name: (cls, source) for name, (cls, source) in loaded.items() if not cls.adapts}
    wanted = variants(loaded, preset, card, o.settings, o.search)
    _check_weights(o, loaded)
    normalisation = _normalisation(o)
    if o.weights is not None and Path(o.weights).is_dir():
        wanted = {name: _of_folder(Path(o.weights), name, loaded[name][0], wanted[name]) for name in loaded}
    bases = {
        name: choose_base(card, preset, o.base, cls.adapts, cls.access is Access.NONE)
        for name, (cls, _) in loaded.items()
    }
    each = [(name, variant) for name in loaded for variant in wanted[name]]
    _check_objective(o.objective, each, loaded)
    _check_bases(o, each, loaded, bases)
    plans = []
    for sigma, seed in itertools.product(_numbers("--sigma", o.sigma, float), _numbers("--seed", o.seed, int)):
        if not 0 < sigma < math.inf:
            raise BenchError(f"--sigma {sigma:g}: must be a number above 0")
        if not 0 <= seed < 2**63:
            raise BenchError(f"--seed {seed}: must be a whole number from 0")
        for name, variant in each:
            cls, source = loaded[name]
            plan = Plan(
                card=card,
                preset=preset,
                base=bases[name],
                normalisation=normalisation,
                weights=None if o.weights is None else Path(o.weights),
                defense=name,
                cls=cls,
                source=source,
                config=variant.config,
                changed=variant.changed,
                candidates=variant.candidates,
                sigma=sigma,
                train_sigma=o.train_sigma or sigma,
                objective=o.objective,
                split=o.split,
                examples=o.examples or str(means.examples),
                radii=radii,
                procedure=procedure,
                noise=o.noise,
                arithmetic=words,
                seed=seed,
                options=replace(
                    o,
                    defenses=name,
                    sigma=repr(sigma),
                    seed=str(seed),
                    settings=variant.settings,
                    search=variant.search,
                ),
            )
            plans.append(plan)
    return plans


def _no_split(card: Card, split: str) -> BenchError:
    named = [name for name in split_names(card) if name.startswith("test-")]
    if split == "test" and named:
        return BenchError(f"{card.name} has no split test; name one of its test parts: --split {', '.join(named[:5])}")
    return unknown("--split", split, split_names(card))


def _check_weights(options: RunOptions, loaded: Loaded) -> None:
    if options.weights is None:
        return
    if options.search:
        raise BenchError("--weights with --search: a search trains its own weights; give only one of the two")
    if len(loaded) > 1:
        raise BenchError(f"--weights {options.weights} are of one defense; --defense names {len(loaded)}")
    if not Path(options.weights).is_dir():
        tensors.refuse_pickle(Path(options.weights))


def _of_folder(folder: Path, name: str, cls: type[Defense], found: Sequence[Variant]) -> list[Variant]:
    """Return the variants of a defense with the settings that its folder of weights states."""
    if not issubclass(cls, FolderWeights):
        raise BenchError(f"--weights {folder} is a folder, and {name} takes none; give a .safetensors file")
    stored = cls.folder_settings(folder)
    return [as_stored(variant, stored, str(folder)) for variant in found]


def _normalisation(options: RunOptions) -> Normalisation | None:
    """Read ``--mean`` and ``--std``; whether the base needs them is checked where it is loaded."""
    if options.mean is None and options.std is None:
        return None
    if options.mean is None or options.std is None:
        raise BenchError(f"{GIVEN} belong together; give both, as in the base's training")
    if options.base is None or is_url(options.base):
        raise BenchError(f"{GIVEN} are those of a file of weights; give --base FILE")
    mean, std = (
        tuple(_numbers(flag, text, float, repeated=True))
        for flag, text in (("--mean", options.mean), ("--std", options.std))
    )
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0 or len(mean) != len(std):
        raise BenchError(
            f"--mean {options.mean} and --std {options.std}: must be a number for each channel, of pixels in [0, 1], "
            f"and std above 0"
        )
    return mean, std


def _check_bases(
    options: RunOptions, each: Sequence[tuple[str, Variant]], loaded: Loaded, bases: Mapping[str, str]
) -> None:
    """Refuse a base without the access that a defense needs, or without the arithmetic asked for."""
    for name, variant in each:
        for config in [variant.config, *(c for _, c in variant.candidates)]:
            access = loaded[name][0].needs(config)
            if access > most_access(bases[name]):
                raise BenchError(f"defense {name} needs {access.name} access; base {bases[name]} only answers queries")
        if arithmetic.parse(options.arithmetic) and is_url(bases[name]):
            raise BenchError(
                f"--arithmetic {options.arithmetic}: base {bases[name]} is computed by its server; set it there"
            )


def _radii(text: str) -> tuple[float, ...]:
    """Read ``--radii``: in any order, with 0 or without. Raises BenchError."""
    found = sorted({0.0, *_numbers("--radii", text, float)})
    if not all(0 <= r <= LARGEST_RADIUS for r in found):  # NaN is not
        raise BenchError(f"--radii {text}: radii are l2 distances, from 0 up")
    if len(found) > MOST_RADII:
        raise BenchError(f"--radii: {len(found) - 1} radii; at most {MOST_RADII - 1} above 0")
    if len({f"{r:g}" for r in found}) < len(found):
        raise BenchError(f"--radii {text}: two of them are printed alike; leave one out")
    return tuple(found)


def make_procedure(kind: str, target: str, n0: int, n: int, alpha: float, radii: tuple[float, ...]) -> Fixed | Anytime:
    """Make a certification procedure. Raises BenchError naming the option whose value is out of range."""
    if kind not in ("fixed", "anytime"):
        raise unknown("--procedure", kind, ("fixed", "anytime"))
    if target not in TARGETS:
        raise unknown("--target", target, TARGETS)
    if n0 < 1:
        raise BenchError(f"--n0 {n0}: must be at least 1")
    if max(n0, n) > MAX_VOTES:
        raise BenchError(f"--n0 {n0} and --n {n}: at most {MAX_VOTES:,} votes an image")
    if not 0 < alpha < 1:
        raise BenchError(f"--alpha {alpha:g}: must lie strictly between 0 and 1")
    made: Fixed | Anytime = Fixed(n0, n, alpha, target)
    at_cap = alpha
    if kind == "anytime":
        tested = tuple(r for r in radii if r > 0)
        made = Anytime(n0, n, alpha, tested, target, calibration(n, alpha, tested))
        at_cap *= 1 - made.ville_share if made.calibration == "ville" else 1
    if n < (least := bounds.smallest_n(at_cap)):
        raise BenchError(f"--n {n}: too few votes for any certificate at alpha {alpha:g}; the smallest is --n {least}")
    return made


def _check_objective(objective: str, each: Sequence[tuple[str, Variant]], loaded: Loaded) -> None:
    """Refuse an objective that does not train a defense, or whose attack gets no gradients from it."""
    if objective not in objectives.OBJECTIVES:
        raise unknown("objective", objective, objectives.OBJECTIVES)
    if objective == "gaussian":  # what trains where none is given
        return
    attacks = objectives.OBJECTIVES[objective].attacks
    for name, variant in each:
        cls = loaded[name][0]
        for config in [variant.config, *(c for _, c in variant.candidates)]:
            if not cls.uses_objective(config):
                raise BenchError(f"--objective {objective}: defense {name} has a loss of its own; run it without")
            if attacks and cls.kind(config) not in UNTRAINED and not cls.differentiable(config):
                others = ", ".join(other for other, entry in objectives.OBJECTIVES.items() if not entry.attacks)
                raise BenchError(
                    f"--objective {objective} attacks the images of training, and {name} gets no gradients with "
                    f"respect to them, since it asks its classifier queries alone; use one of {others}"
                )


def _words(flag: str, text: str, repeated: bool = False) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    if not words:
        raise BenchError(f"{flag} is empty")
    return words if repeated else list(dict.fromkeys(words))


def _numbers(flag: str, text: str, kind: Callable[[str], _Number], repeated: bool = False) -> list[_Number]:
    try:
        return [kind(w) for w in _words(flag, text, repeated)]
    except ValueError:
        raise BenchError(f"{flag} {text}: must be a number, or several with commas between") from None
