"""Made-up folders in the layouts of WILDS and of CIFAR-10-C."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.madeup import RNG, png

CAMELYON = ("", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split")
IWILDCAM = ("split", "location_remapped", "sequence_remapped", "datetime", "y", "category_id", "filename", "image_id")


def table(path: Path, titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerows([titles, *rows])


def camelyon(root: Path, name: str = "camelyon17_v1.0", each: int = 4, size: int = 96) -> list[list[Any]]:
    """Write ``each`` patches of both classes, and of both values of split, from each of five centers; return the rows.

    As in WILDS, the file's split says nothing of the centers 1 and 2.
    """
    (root / name).mkdir(parents=True)
    rows: list[list[Any]] = []
    for center in (2, 0, 1, 4, 3):
        for i in range(4 * each):
            patient, node, x = f"{20 * center + i:03}", i % 5, 32 * len(rows)
            rows.append([len(rows), patient, node, x, 64, i % 2, center, center, i // 2 % 2])
            folder = root / name / "patches" / f"patient_{patient}_node_{node}"
            folder.mkdir(parents=True, exist_ok=True)
            place = folder / f"patch_patient_{patient}_node_{node}_x_{x}_y_64.png"
            place.write_bytes(png("RGB", (size, size)))
    table(root / name / "metadata.csv", CAMELYON, rows)
    return rows


def iwildcam(root: Path, each: int = 3, size: tuple[int, int] = (300, 230)) -> list[list[Any]]:
    """Write ``each`` photographs of each of WILDS's five splits; return the rows."""
    folder = root / "iwildcam_v2.0"
    (folder / "train").mkdir(parents=True)
    rows = []
    for number, split in enumerate(["train", "val", "test", "id_val", "id_test"] * each):
        name = f"photo-{number}.jpg"
        (folder / "train" / name).write_bytes(png("RGB", size, "JPEG"))
        rows.append([split, number, 7, "2013-01-01 00:00:00.000", 181 - number, 900, name, f"id{number}"])
    table(folder / "metadata.csv", IWILDCAM, rows)
    return rows


def corrupted(folder: Path, names: Sequence[str] = ("fog",), each: int = 10, side: int = 32) -> np.ndarray[Any, Any]:
    """Write random images of five severities of each corruption, and their labels; return the last array."""
    folder.mkdir(parents=True)
    for name in names:
        images = RNG.integers(0, 256, (5 * each, side, side, 3)).astype(np.uint8)
        np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(each) % 10, 5).astype(np.uint8))
    return images
