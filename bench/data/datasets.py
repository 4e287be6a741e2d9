"""Load cards (datasets/*.toml) and the splits of images and labels that they describe."""

from __future__ import annotations

import hashlib
import importlib.resources
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from bench.data import readers
from bench.data.card import Card, Recipe, own_part, split_names
from bench.data.folders import class_names
from bench.data.parquet_files import agreed
from bench.data.sources import Part, PartName, has
from bench.data.split import Split
from bench.errors import BenchError, unknown
from bench.io import limits

SplitName = PartName
LARGEST = limits.MB  # maximum size of a card
SPLIT_OFF: tuple[Literal["test", "validation"], ...] = ("test", "validation")
CUT = 5000  # maximum size of a split cut from train, where the card states none


def card_files() -> dict[str, Path]:
    """Return the files of certbench's own cards by name."""
    folder = Path(__file__).parents[2] / "datasets"
    if (folder / "digits.toml").is_file():
        files = list(folder.iterdir())
    else:  # installed: a folder of that name would be Hugging Face's package
        # A folder without Python is a namespace package, which may have several locations and no path of its own.
        files = [Path(str(f)) for f in importlib.resources.files("certbench_cards").iterdir()]
    return {f.stem: f for f in sorted(files) if f.suffix == ".toml"}


def load_card(name: str) -> Card:
    """Load the card of that name, or of that file if it ends in .toml. Raises BenchError naming the wrong key."""
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
        where = ".".join(map(str, first["loc"]))  # empty where keys contradict each other
        problem = first["msg"].removeprefix("Value error, ")
        raise BenchError(": ".join(filter(None, (str(path), where, problem)))) from None
    except (ValueError, RecursionError) as e:  # of tomllib, and of int and datetime on impossible values
        raise BenchError(f"{path}: not TOML: {e}") from None
    return replace(
        card,
        mean=card.mean or (0.5,) * card.shape[0],
        std=card.std or (0.25,) * card.shape[0],
        bases=card.bases or {"vit": _small_vit(card.shape)},
    )


def _small_vit(shape: tuple[int, int, int]) -> Recipe:
    """Return the recipe of a ViT that trains from scratch in minutes, with about 8 patches along each side."""
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
    """Load one split of a card's data set."""
    return load_splits(card, split)[0]


def load_splits(card: Card, *names: SplitName) -> list[Split]:
    """Load splits of a card's data set, reading each file once. The card alone decides which image is in which split.

    A part that the data have is used completely, in its own order. The others are cut from one fixed shuffle of its
    train part: first test, then validation; train is the rest. Raises BenchError for a split that the card does not
    have, and where the data are missing or do not match the card.
    """
    for name in names:
        if name not in split_names(card):
            raise unknown(f"split of {card.name}", name, split_names(card))
    parts: dict[SplitName, Part] = {}
    cut: dict[str, NDArray[np.int64]] = {}
    splits = []
    for name in names:
        own = name if own_part(card, name) else "train"
        if own not in parts:
            parts[own] = readers.read(card, own)
        part = parts[own]
        whole = Split(name, part.images, part.labels, card.levels, part.origin, part.names, part.domains)
        if own == "train":
            cut = cut or _cut(card, len(whole))
            whole = whole.select(cut[name])
        splits.append(whole)
    agreed(card, [part.names for part in parts.values()])
    return splits


def whole_train(card: Card, train: Split, validation: Split) -> Split:
    """Return all images of the train part: those of ``train``, then those that were cut from it for ``validation``."""
    return train if has(card.source, "validation") else train.joined(validation)


def _cut(card: Card, rows: int) -> dict[str, NDArray[np.int64]]:
    """Divide the rows of the train part between train and the splits that the source does not have."""
    sizes: dict[str, int] = {}
    for name in SPLIT_OFF:
        if name in split_names(card) and not has(card.source, name):
            sizes[name] = card.splits.get(name, max(1, min(rows // 10, CUT)))
    if sum(sizes.values()) >= rows:
        needed = " and ".join(f"{size} for {name}" for name, size in sizes.items())
        raise BenchError(
            f"card {card.name}: the {rows} images of its train part are too few for {needed}; lower its [splits]"
        )
    order = np.array(sorted(range(rows), key=lambda i: hashlib.sha256(f"{card.name}/{i}".encode()).digest()))
    return dict(zip([*sizes, "train"], np.split(order, np.cumsum([*sizes.values()])), strict=True))


def choose(split: Split, examples: str) -> list[int]:
    """Return the indices of ``--examples``: every:K for each K-th image, N for a fixed class-balanced subset.

    The subset does not depend on a seed, and a larger subset contains the smaller ones.
    """
    total = len(split)
    if examples.startswith("every:"):
        step = examples.removeprefix("every:")
        if not step.isdigit() or int(step) < 1:
            raise BenchError(f"--examples {examples}: K in every:K must be a whole number from 1")
        return list(range(0, total, int(step)))
    if not examples.isdigit() or not 1 <= int(examples) <= total:
        raise BenchError(f"--examples {examples}: must be 1 to {total} (the {split.name} split's size) or every:K")
    # Sort by how many images of the same class come before.
    seen: dict[int, int] = {}
    rank = []
    for i, label in enumerate(split.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        rank.append((seen[label], label, i))
    return sorted(i for _, _, i in sorted(rank)[: int(examples)])
