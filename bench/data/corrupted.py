"""Read corrupted test images in the layout of CIFAR-10-C: an array of each corruption, and one of labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.data.card import Card, root
from bench.data.sources import Corruptions, Part, PartName, located
from bench.errors import BenchError, one_line
from bench.io import limits


def read_corrupted(card: Card, source: Corruptions, part: PartName) -> Part:
    """Read the images of one corruption and severity. Raises BenchError where a file is missing or of another shape."""
    name, severity = source.parts()[part]
    folder, called = root(card, source)
    labels = _array(folder, source.labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise BenchError(
            f"{folder / source.labels}: {_described(labels)}; labels are whole numbers, one for each image of a "
            f"corruption; get the file again"
        )
    if not len(labels) or len(labels) % source.severities:
        raise BenchError(
            f"{folder / source.labels}: {len(labels):,} labels are not {source.severities} severities of one size; "
            f"correct severities in the card's [corruptions]"
        )
    file = f"{name}.npy"
    images = _array(folder, file)
    channels, height, width = card.shape
    if images.dtype != np.uint8 or images.shape != (len(labels), height, width, channels):
        raise BenchError(
            f"{folder / file}: {_described(images)}; {len(labels):,} labels and the card's shape need uint8 "
            f"[{len(labels)}, {height}, {width}, {channels}]; get the file again"
        )
    count = len(labels) // source.severities
    start = (severity - 1) * count
    rows = slice(start, start + count)
    if (size := images[rows].nbytes) > limits.memory() // 2:
        raise BenchError(f"{folder / file}: {size / 1e9:.1f} GB of images, more than half of this machine's memory")
    numbers = labels[rows].astype(np.int64)
    if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= len(card.classes)))):
        raise BenchError(
            f"{folder / source.labels}: row {start + wrong[0]}: label {numbers[wrong[0]]} is not among the card's "
            f"{len(card.classes)} classes; correct classes in the card"
        )
    pixels = np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2))
    where = f"{called}/{file}, severity {severity} of {source.severities}, rows {start:,} to {start + count - 1:,}"
    return Part(pixels, numbers, where)


def _array(folder: Path, name: str) -> NDArray[np.generic]:
    """Map the array of a .npy file into memory; pickled objects are refused without being read."""
    path = located(folder, name)
    if not path.is_file():
        raise BenchError(f"no file {path}; put the arrays of the corruptions there")
    try:
        found: NDArray[np.generic] = np.lib.format.open_memmap(path, mode="r")
    except Exception as e:  # numpy parses an untrusted header, and raises errors of any type
        raise BenchError(f"{path}: not a readable .npy file of numbers: {one_line(e)}; get the file again") from None
    return found


def _described(array: NDArray[np.generic]) -> str:
    return f"{array.dtype} [{', '.join(map(str, array.shape))}]"
