"""Data-set cards: datasets/*.toml -> splits of images and labels.

A card is data, no Python: where the images come from, their shape and levels, the splits, and what
each preset means here. Images stay integers 0 .. levels-1; pixels are integers / (levels - 1).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from bench.errors import BenchError, unknown

SplitName = Literal["train", "validation", "test"]
_STRICT = ConfigDict(extra="forbid")


@checked(config=_STRICT, frozen=True)
class Preset:
    """What quick, standard or paper means on this data set."""

    examples: int
    n0: int
    n: int
    base: str = ""  # a recipe of [bases]; default: the card's first
    train_examples: int = 0  # 0: all
    epoch_scale: float = 1.0  # multiplies the epochs of every training that starts from a preset


@checked(config=_STRICT, frozen=True)
class Recipe:
    """A base classifier: a timm model and the schedule that trains it clean, from scratch or pretrained weights."""

    model: str
    schedule: dict[str, Any]
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False  # start from timm's published weights, with their normalisation
    summary: str = ""


@checked(config=_STRICT, frozen=True)
class Card:
    """One data set, as its TOML file states it."""

    name: str
    source: str
    shape: tuple[int, int, int]
    levels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    radii: tuple[float, ...]
    splits: dict[str, int]
    presets: dict[str, Preset]
    bases: dict[str, Recipe]
    preset: str = "quick"
    augment: tuple[Literal["crop", "flip"], ...] = ()

    def sha256(self) -> str:
        """Hash of what decides images and labels: the presets, recipes and report grid may change without it."""
        parts = {k: getattr(self, k) for k in ("name", "source", "shape", "levels", "classes", "splits")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Images of one split: integers [N, C, H, W] and labels [N]."""

    name: str
    integers: NDArray[np.uint8]
    labels: NDArray[np.int64]
    levels: int

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """float32 pixels in [0, 1] of the given rows, [len(indices), C, H, W]."""
        pixels: NDArray[np.float32] = self.integers[indices].astype(np.float32) / np.float32(self.levels - 1)
        return pixels

    def sha256(self, indices: Any = slice(None)) -> str:
        """Hash of the given rows' images and labels: what a card declares is not proof of what was read."""
        h = hashlib.sha256(np.ascontiguousarray(self.integers[indices]).tobytes())
        h.update(self.labels[indices].astype("<i8").tobytes())
        return h.hexdigest()

    def first(self, count: int) -> Split:
        """The first ``count`` rows, or all of them for 0."""
        return self if not count else Split(self.name, self.integers[:count], self.labels[:count], self.levels)


def card_files() -> dict[str, Path]:
    """Name -> file of the cards that come with certbench."""
    folder = Path(__file__).parent.parent / "datasets"
    if not (folder / "digits.toml").is_file():  # installed: that folder is Hugging Face's package, if anything
        folder = Path(str(importlib.resources.files("certbench_cards")))
    return {f.stem: f for f in sorted(folder.glob("*.toml"))}


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
        with path.open("rb") as f:
            card = TypeAdapter(Card).validate_python(tomllib.load(f))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BenchError(f"{path}: not TOML: {e}") from None
    except ValidationError as e:
        first = e.errors()[0]
        raise BenchError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if card.preset not in card.presets:
        raise BenchError(f"{path}: preset = {card.preset!r} has no [presets.{card.preset}] table")
    return card


def load_split(card: Card, split: SplitName) -> Split:
    """One split of the card's data set. Which image is in which split is fixed by the card alone."""
    integers, labels = _read(card)
    order = np.array(sorted(range(len(labels)), key=lambda i: hashlib.sha256(f"{card.name}/{i}".encode()).digest()))
    test, validation = card.splits["test"], card.splits["validation"]
    part = {"test": order[:test], "validation": order[test : test + validation], "train": order[test + validation :]}
    rows = part[split]
    return Split(split, integers[rows], labels[rows], card.levels)


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


def _read(card: Card) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if card.source != "sklearn:digits":
        raise BenchError(f"card {card.name}: unknown source {card.source!r}; known: sklearn:digits")
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images[:, None].astype(np.uint8), data.target.astype(np.int64)
