"""Read a part of a card's data: train, and the others where the data have their own.

Pictures stay encoded, as bytes or files, until their rows are accessed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.card import Card
from bench.data.corrupted import read_corrupted
from bench.data.csv_files import read_csv
from bench.data.folders import read_folder
from bench.data.parquet_files import read_parquet
from bench.data.sources import Csv, Folder, Parquet, Part, PartName, Stored
from bench.errors import BenchError, note


def read(card: Card, part: PartName) -> Part:
    """Read a part that the source has. Raises BenchError where the data are missing or do not match the card."""
    source = card.source
    if card.corruptions and part in card.corruptions.parts():
        return read_corrupted(card, card.corruptions, part)
    if isinstance(source, Parquet):
        found = read_parquet(card, source, part)
    elif isinstance(source, Folder):
        found = read_folder(card, source, part)
    elif isinstance(source, Csv):
        found = read_csv(card, source, part)
    else:
        found = _digits(card)
    if not len(found.labels):
        raise BenchError(f"card {card.name}: the {part} part ({found.origin}) is empty; correct the card's [source]")
    if isinstance(source, Stored) and (known := source.rows.get(part, len(found.labels))) != len(found.labels):
        remark = f"{len(found.labels):,} rows of the {part} part, which has {known:,} in the complete data set"
        note(f"card {card.name}: {remark}")
        found = replace(found, origin=f"{found.origin}; {remark}")
    if isinstance(source, Stored) and source.resize:
        height, width = card.shape[1:]
        remark = f"shorter side resized to {source.resize} (bilinear), centre cropped to {height}x{width}"
        if part == "train" and "resized-crop" in card.augment:
            remark = f"in training random crops resized to {height}x{width} (resized-crop), elsewhere {remark}"
        if part == "train":
            note(f"card {card.name}: {remark}")
        found = replace(found, origin=f"{found.origin}; {remark}")
    return found


def _digits(card: Card) -> Part:
    if (card.shape, card.levels, len(card.classes)) != ((1, 8, 8), 17, 10):
        raise BenchError(f"card {card.name}: scikit-learn's digits have shape [1, 8, 8], 17 levels and 10 classes")
    images, labels = _digits_file()
    return Part(images[:, None].astype(np.uint8), labels.astype(np.int64), "scikit-learn")


def _digits_file() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read images [N, 8, 8] and labels from scikit-learn's file; by its own function where the file is elsewhere.

    Importing scikit-learn takes half a second of every command.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            rows = np.loadtxt(file, delimiter=",")
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target
