"""The schema of a data set's card, datasets/*.toml.

A card holds no code. It states the source of the images, their shape and levels, the splits, base classifiers, and
the presets. Images are integers 0 .. levels-1; pixels are integers / (levels - 1).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, StringConstraints
from pydantic.dataclasses import dataclass as checked

from bench.data.sources import Corruptions, Digits, PartName, Source, Stored, has, located, same
from bench.errors import BenchError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


_Side = Annotated[int, Field(ge=1, le=16_384)]
_Mean = tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...]  # of pixels in [0, 1]; bounds exclude infinity
_Std = tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...]


@checked(config=_STRICT, frozen=True)
class Preset:
    """The settings of a preset for this data set: quick, standard, paper, or a name of the card's own."""

    # Images that are certified: a number, class-balanced, or "every:K".
    examples: PositiveInt | Annotated[str, StringConstraints(pattern=r"^every:[1-9]\d*$")]
    n0: PositiveInt  # votes that select the class, per image
    n: PositiveInt  # votes that bound the probability, per image
    base: str = ""  # a recipe of [bases]; default: the card's first
    transfer_base: str = ""  # a value of --base for defenses that adapt a base of another task; default: none
    # A value of --base for defenses that use its architecture alone; its weights stay untrained. Default: base.
    scratch_base: str = ""
    better_base: str = ""  # printed with the accuracy of ``base`` after its training: what would give a better one
    train_examples: Annotated[int, Field(ge=0)] = 0  # training images, class-balanced; 0: all
    epoch_scale: Annotated[float, Field(gt=0)] = 1.0  # multiplies the epochs of defenses' default schedules
    # Of the forward passes that train defenses; bfloat16 by autocast: weights, losses and the optimizer in float32.
    training_arithmetic: Literal["float32", "bfloat16"] = "float32"


@checked(config=_STRICT, frozen=True)
class Recipe:
    """A base classifier: a timm model, and the schedule of its clean training."""

    model: str  # a name of timm
    schedule: dict[str, Any] | None = None  # of the clean training; without one: published weights as they are
    args: dict[str, Any] = field(default_factory=dict)  # of the model
    pretrained: bool = False  # start from timm's published weights, with their normalisation
    classes: tuple[str, ...] = ()  # train on these classes alone, as a base of another task; default: all
    mean: _Mean = ()  # of a model trained here; default: the card's
    std: _Std = ()  # as mean
    summary: str = ""  # for bench list bases

    def __post_init__(self) -> None:
        if not self.pretrained and self.schedule is None:
            raise ValueError("schedule: missing; only a pretrained model needs none")
        if self.schedule is None and self.classes:
            raise ValueError("classes: no schedule trains on them")
        if self.pretrained and (self.mean or self.std):
            raise ValueError("mean, std: a pretrained model has its own")
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: at least two, all different")


def _presets() -> dict[str, Preset]:
    return {
        "quick": Preset(examples=100, n0=100, n=1000, train_examples=10000, epoch_scale=0.15),
        "standard": Preset(examples=500, n0=100, n=10000),
        "paper": Preset(examples=500, n0=100, n=100000),
    }


def _names(value: Any) -> Any:
    if type(value) is not int:
        return value
    if not 2 <= value <= 100_000:
        raise ValueError(f"{value}: must be 2 to 100,000, or a list of names")
    return tuple(map(str, range(value)))


@checked(config=_STRICT, frozen=True)
class Card:
    """A data set's card; name, source and shape are required."""

    # The name is part of folder names, so it must not be a path.
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    source: Source  # where the pictures are, and how they are stored
    shape: tuple[_Side, _Side, _Side]  # channels, height, width
    levels: Annotated[int, Field(ge=2, le=256)] = 256  # of a pixel
    classes: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()  # names, or their number; default: folder names
    mean: _Mean = ()  # of each channel, of pixels in [0, 1]: the normalisation of bases
    std: _Std = ()  # as mean
    # Of tables, l2 between pixels in [0, 1].
    radii: Annotated[tuple[Annotated[float, Field(ge=0, le=1e30)], ...], Field(min_length=1, max_length=100)] = (
        *(0.0, 0.25, 0.5, 0.75, 1.0),
    )
    # Sizes of the splits that are cut from train, where the source has no such part.
    splits: dict[Literal["test", "validation"], PositiveInt] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=_presets)  # by name; own ones replace these
    bases: dict[str, Recipe] = field(default_factory=dict)  # base classifiers that are trained here, by name
    preset: str = "quick"  # without --preset
    augment: tuple[Literal["crop", "resized-crop", "flip"], ...] = ()  # of training images
    corruptions: Corruptions | None = None  # of the test images, as further test parts
    home: Path = Path()  # the folder of the card's file; not a key of it

    def __post_init__(self) -> None:
        _check_channels("", self, self.shape[0])
        for name, recipe in self.bases.items():
            _check_channels(f"bases.{name}.", recipe, self.shape[0])
        for name in self.splits:
            if has(self.source, name):
                raise ValueError(f"splits.{name}: the source has its own {name} part, which is used completely")
        if "resized-crop" in self.augment and (isinstance(self.source, Digits) or "crop" in self.augment):
            raise ValueError("augment: resized-crop needs pictures, and replaces crop")
        self._check_pictures()
        if self.corruptions and self.levels != 256:
            raise ValueError("levels: corrupted images have 256")
        if len(self.classes) == 1 or len(set(map(same, self.classes))) != len(self.classes):
            raise ValueError("classes: at least two, all different")
        if len({f"{r:g}" for r in self.radii}) < len(self.radii) or list(self.radii) != sorted(self.radii):
            raise ValueError("radii: must increase, and differ in six digits")
        if self.preset not in self.presets:
            raise ValueError(f"preset = {self.preset!r} has no [presets.{self.preset}] table")

    def _check_pictures(self) -> None:
        if isinstance(self.source, Digits):
            return
        if self.shape[0] not in (1, 3):
            raise ValueError(f"shape: pictures have 1 or 3 channels, not {self.shape[0]}")
        if self.levels != 256:
            raise ValueError("levels: pictures have 256")
        if 0 < self.source.resize < max(self.shape[1:]):
            raise ValueError(f"source.resize: {self.source.resize} is less than the shape's height or width")
        if self.corruptions and (both := self.corruptions.parts().keys() & self.source.parts.keys()):
            raise ValueError(f"corruptions: {min(both)} is a part of the source too; rename one")

    def sha256(self) -> str:
        """Return the hash of everything that decides images and labels; not of presets, recipes and radii.

        A card without named test parts has the hash that it had before these existed.
        """
        parts = {k: getattr(self, k) for k in ("name", "shape", "levels", "classes", "splits")}
        # Not of the folder or how its pictures are stored; the images in it are hashed themselves. Nor of corruptions:
        # these are other images than those of the other splits, whose records keep the hash that they have.
        source = {k: v for k, v in asdict(self.source).items() if k not in ("folder", "archive", "lossless", "rows")}
        parts["source"] = {k: v for k, v in source.items() if k != "parts" or v}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_channels(where: str, owner: Card | Recipe, channels: int) -> None:
    for key in ("mean", "std"):
        if getattr(owner, key) and len(getattr(owner, key)) != channels:
            raise ValueError(f"{where}{key}: {len(getattr(owner, key))} values for {channels} channels")


def own_part(card: Card, part: PartName) -> bool:
    """Return whether the card's data have their own part of that name; others are cut from train."""
    return has(card.source, part) or bool(card.corruptions and part in card.corruptions.parts())


def split_names(card: Card) -> tuple[PartName, ...]:
    """Return the names of all splits of a card: train, validation, test, and named test parts.

    A source with named test parts alone has no split ``test``, unless the card cuts one from train.
    """
    named = [] if isinstance(card.source, Digits) else list(card.source.parts)
    test = ["test"] if not named or "test" in card.splits or has(card.source, "test") else []
    return ("train", "validation", *test, *named, *(card.corruptions.parts() if card.corruptions else ()))


def first_split(card: Card) -> PartName:
    """Return test, or validation of a card that has named test parts alone: for a check that needs any images."""
    return "test" if "test" in split_names(card) else "validation"


def root(card: Card, source: Stored | Corruptions) -> tuple[Path, str]:
    """Return the local data folder, and its name in records, without the user's path."""
    if source.folder:
        return located(card.home, source.folder), Path(source.folder).name
    usual = f"{card.name}-c" if isinstance(source, Corruptions) else card.name
    data = os.environ.get("CERTBENCH_DATA")
    if not data:
        raise BenchError(f"card {card.name}: no data folder; set CERTBENCH_DATA to the folder that contains {usual}/")
    published = source.archive and not (Path(data) / usual).exists() and (Path(data) / source.archive).is_dir()
    name = source.archive if published else usual
    return Path(data) / name, f"$CERTBENCH_DATA/{name}"
