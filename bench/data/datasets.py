"""Data-set cards: datasets/*.toml -> splits of images and labels.

A card is data, no Python: where the images come from, their shape and levels, the splits, and what
each preset means here. Images stay integers 0 .. levels-1; pixels are integers / (levels - 1).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from bench.data import readers
from bench.data.folders import class_names
from bench.data.parquet_files import agreed
from bench.data.pictures import Pictures
from bench.data.sources import Digits, Part, PartName, Source, has, same
from bench.errors import BenchError, unknown
from bench.io import limits

SplitName = PartName
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
LARGEST = limits.MB  # of a card
_Side = Annotated[int, Field(ge=1, le=16_384)]
SPLIT_OFF: tuple[Literal["test", "validation"], ...] = ("test", "validation")
CUT = 5000  # the most images a split cut from train takes where the card gives no number


@checked(config=_STRICT, frozen=True)
class Preset:
    """What quick, standard or paper means on this data set."""

    examples: PositiveInt | Annotated[str, StringConstraints(pattern=r"^every:[1-9]\d*$")]
    n0: PositiveInt
    n: PositiveInt
    base: str = ""  # a recipe of [bases]; default: the card's first
    transfer_base: str = ""  # the base of defenses that adapt one of another task; as --base takes it; default: none
    train_examples: Annotated[int, Field(ge=0)] = 0  # 0: all
    epoch_scale: Annotated[float, Field(gt=0)] = 1.0  # multiplies the epochs of every training of a default schedule


@checked(config=_STRICT, frozen=True)
class Recipe:
    """A base classifier: a timm model and the schedule that trains it clean, from scratch or pretrained weights."""

    model: str
    schedule: dict[str, Any]
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False  # start from timm's published weights, with their normalisation
    classes: tuple[str, ...] = ()  # train on the images of these alone: another task; default: all
    summary: str = ""

    def __post_init__(self) -> None:
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: two at least, all different")


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
    """One data set, as its TOML file states it; all but name, source and shape has a default."""

    # The name is part of folder names, so it must not lead out of them.
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    source: Source
    shape: tuple[_Side, _Side, _Side]
    levels: Annotated[int, Field(ge=2, le=256)] = 256
    classes: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()  # names, or how many; default: names of folders
    mean: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] = ()  # pixels in [0, 1]; neither may end in infinity
    std: tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...] = ()
    radii: Annotated[tuple[Annotated[float, Field(ge=0, le=1e30)], ...], Field(min_length=1, max_length=100)] = (
        *(0.0, 0.25, 0.5, 0.75, 1.0),
    )
    # Sizes of the splits that are cut from train, because the source has no such part.
    splits: dict[Literal["test", "validation"], PositiveInt] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=_presets)
    bases: dict[str, Recipe] = field(default_factory=dict)
    preset: str = "quick"
    augment: tuple[Literal["crop", "flip"], ...] = ()
    home: Path = Path()  # the card's own folder; not a key of the file

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            if getattr(self, key) and len(getattr(self, key)) != self.shape[0]:
                raise ValueError(f"{key}: {len(getattr(self, key))} values for {self.shape[0]} channels")
        for name in self.splits:
            if has(self.source, name):
                raise ValueError(f"splits.{name}: the source has its own {name} part, which is taken whole")
        if not isinstance(self.source, Digits):
            if self.shape[0] not in (1, 3):
                raise ValueError(f"shape: pictures have 1 or 3 channels, not {self.shape[0]}")
            if self.levels != 256:
                raise ValueError("levels: pictures have 256")
            if 0 < self.source.resize < max(self.shape[1:]):
                raise ValueError(f"source.resize: {self.source.resize} is less than the shape's side")
        if len(self.classes) == 1 or len(set(map(same, self.classes))) != len(self.classes):
            raise ValueError("classes: two at least, all different")
        if len({f"{r:g}" for r in self.radii}) < len(self.radii) or list(self.radii) != sorted(self.radii):
            raise ValueError("radii: rising, and not printed alike")
        if self.preset not in self.presets:
            raise ValueError(f"preset = {self.preset!r} has no [presets.{self.preset}] table")

    def sha256(self) -> str:
        """Hash of what decides images and labels: the presets, recipes and report grid may change without it."""
        parts = {k: getattr(self, k) for k in ("name", "shape", "levels", "classes", "splits")}
        # Where a copy lies decides nothing; what is in it is hashed with the images.
        parts["source"] = {k: v for k, v in asdict(self.source).items() if k != "folder"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Images of one split: integers [N, C, H, W], in memory or decoded when asked for, and labels [N]."""

    name: str
    images: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64]
    levels: int
    found: str = ""  # where, and what was left out or reordered
    names: tuple[str, ...] = ()  # of the classes in the data, in the order of the labels; empty where it has none

    @property
    def origin(self) -> str:
        """Where the data were found, for the record, and what was left out, reordered or converted."""
        changes = self.images.changes() if isinstance(self.images, Pictures) else ""
        return "; ".join(filter(None, (self.found, changes)))

    def __len__(self) -> int:
        return len(self.labels)

    def integers(self, indices: Any = slice(None)) -> NDArray[np.uint8]:
        """Integers 0 .. levels-1 of the given rows, [len(indices), C, H, W]. Raises BenchError for a bad picture."""
        integers: NDArray[np.uint8] = self.images[indices]
        return integers

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """float32 pixels in [0, 1] of the given rows, [len(indices), C, H, W]. Raises BenchError for a bad picture."""
        pixels: NDArray[np.float32] = self.integers(indices).astype(np.float32) / np.float32(self.levels - 1)
        return pixels

    def sha256(self, indices: Any = None) -> str:
        """Hash of the given rows' images and labels: what a card declares is not proof of what was read.

        Of given rows it is the pixels' own hash, however they were stored. Of the whole split it is that
        of the encoded pictures where they are kept so (see ``Pictures.fingerprint``): nothing is decoded.
        """
        if indices is None and isinstance(self.images, Pictures):
            h = hashlib.sha256(self.images.fingerprint())
        else:
            h = hashlib.sha256(np.ascontiguousarray(self.integers(indices := _all(indices))).tobytes())
        h.update(self.labels[_all(indices)].astype("<i8").tobytes())
        return h.hexdigest()

    def first(self, count: int) -> Split:
        """The first ``count`` rows, or all of them for 0."""
        return self.select(slice(count)) if count else self

    def select(self, indices: Any) -> Split:
        """Those rows, nothing decoded."""
        images = self.images.select(indices) if isinstance(self.images, Pictures) else self.images[indices]
        return replace(self, images=images, labels=self.labels[indices])


def _all(indices: Any) -> Any:
    return slice(None) if indices is None else indices


def card_files() -> dict[str, Path]:
    """Name -> file of the cards that come with certbench."""
    folder = Path(__file__).parents[2] / "datasets"
    if (folder / "digits.toml").is_file():
        files = list(folder.iterdir())
    else:  # installed: that folder is Hugging Face's package, if anything
        # A folder without Python is a namespace package, which may have several places and has no path of its own.
        files = [Path(str(f)) for f in importlib.resources.files("certbench_cards").iterdir()]
    return {f.stem: f for f in sorted(files) if f.suffix == ".toml"}


def load_card(name: str) -> Card:
    """The card of that name, or of that file when it ends in .toml. Raises BenchError naming the faulty key."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise BenchError(f"no data set card at {name}")
    else:
        files = card_files()
        if name not in files:
            raise unknown("data set", name, files)
        path = files[name]
    try:
        keys = tomllib.loads(limits.contents(path, LARGEST).decode())
        if "home" in keys:
            raise BenchError(f"{path}: home: not a key of a card")
        card = TypeAdapter(Card).validate_python(keys | {"home": path.parent})
        card = replace(card, classes=card.classes or class_names(card))
    except OSError as e:
        raise BenchError(f"{path}: {e.strerror}") from None
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))  # empty where the card's keys do not go together
        said = first["msg"].removeprefix("Value error, ")
        raise BenchError(": ".join(filter(None, (str(path), where, said)))) from None
    except (ValueError, RecursionError) as e:  # tomllib's own, int's and datetime's for what no number or date can be
        raise BenchError(f"{path}: not TOML: {e}") from None
    return replace(
        card,
        mean=card.mean or (0.5,) * card.shape[0],
        std=card.std or (0.25,) * card.shape[0],
        bases=card.bases or {"vit": _small_vit(card.shape)},
    )


def _small_vit(shape: tuple[int, int, int]) -> Recipe:
    """A ViT that trains from scratch in minutes: patches that divide the image, about 8 a side."""
    channels, height, width = shape
    side = math.gcd(height, width)
    patch = min((p for p in range(1, side + 1) if side % p == 0), key=lambda p: abs(p - min(height, width) / 8))
    args = {"img_size": [height, width], "patch_size": patch, "in_chans": channels}
    return Recipe(
        model="vit_tiny_patch16_224",
        args=args | {"embed_dim": 128, "depth": 6, "num_heads": 4},
        schedule={"epochs": 10, "batch": 128, "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1},
        summary=f"ViT, patch {patch}, width 128, depth 6, trained here clean",
    )


def load_split(card: Card, split: SplitName) -> Split:
    """One split of the card's data set."""
    return load_splits(card, split)[0]


def load_splits(card: Card, *names: SplitName) -> list[Split]:
    """Splits of the card's data set, each of its files read once. Which image is in which split is fixed by the card.

    A part that the source has is taken whole, in its own order. Others are cut from one fixed shuffle of its train
    part: test, then validation, then train is the rest. Raises BenchError where the data are absent or not as the
    card says.
    """
    parts: dict[SplitName, Part] = {}
    cut: dict[str, NDArray[np.int64]] = {}
    splits = []
    for name in names:
        own = name if has(card.source, name) else "train"
        if own not in parts:
            parts[own] = readers.read(card, own)
        part = parts[own]
        whole = Split(name, part.images, part.labels, card.levels, part.origin, part.names)
        if own == "train":
            cut = cut or _cut(card, len(whole))
            whole = whole.select(cut[name])
        splits.append(whole)
    agreed(card, [part.names for part in parts.values()])
    return splits


def _cut(card: Card, rows: int) -> dict[str, NDArray[np.int64]]:
    """The rows of the train part that go to train and to each split the source has not."""
    sizes: dict[str, int] = {}
    for name in SPLIT_OFF:
        if not has(card.source, name):
            sizes[name] = card.splits.get(name, max(1, min(rows // 10, CUT)))
    if sum(sizes.values()) >= rows:
        asked = " and ".join(f"{size} for {name}" for name, size in sizes.items())
        raise BenchError(f"card {card.name}: {rows} images in its train part are too few to cut off {asked}")
    order = np.array(sorted(range(rows), key=lambda i: hashlib.sha256(f"{card.name}/{i}".encode()).digest()))
    return dict(zip([*sizes, "train"], np.split(order, np.cumsum([*sizes.values()])), strict=True))


def choose(split: Split, examples: str) -> list[int]:
    """Indices into the split: ``every:K`` each K-th image, ``N`` a fixed class-balanced subset.

    The subset does not depend on any seed, and the subset of a smaller N is part of a larger one's.
    """
    total = len(split)
    if examples.startswith("every:"):
        step = examples.removeprefix("every:")
        if not step.isdigit() or int(step) < 1:
            raise BenchError(f"--examples {examples}: K in every:K must be a whole number from 1")
        return list(range(0, total, int(step)))
    if not examples.isdigit() or not 1 <= int(examples) <= total:
        raise BenchError(f"--examples {examples}: must be 1 to {total} (the {split.name} split's size) or every:K")
    # The k-th image of every class comes before the (k+1)-th of any.
    seen: dict[int, int] = {}
    rank = []
    for i, label in enumerate(split.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        rank.append((seen[label], label, i))
    return sorted(i for _, _, i in sorted(rank)[: int(examples)])
