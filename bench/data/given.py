"""Pictures that a user gives for a prediction, brought to a card's shape and grid, or refused.

A card's images are integers 0 .. levels-1. A picture file has 8 bits: of a card with 256 levels these are the
integers; of one with fewer, level k is stored as the nearest of 255 k / (levels - 1), which no other level is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.card import Card
from bench.data.decoding import SUFFIXES, decode
from bench.data.sources import Stored
from bench.errors import BenchError, note, one_line, unknown

FITS = ("levels", "resize-crop")
TOLERANCE = 1e-3  # of a step between levels: what float32 and a library's conversion may move a pixel by


@dataclass(frozen=True)
class GivenPicture:
    """A picture as integers 0 .. levels-1, [C, H, W].

    ``changes`` describe how decoding changed what the file shows, ``fitted`` how it was fitted to the card.
    """

    name: str
    integers: NDArray[np.uint8]
    changes: tuple[str, ...] = ()
    fitted: tuple[str, ...] = ()


def check_fit(fit: str | None) -> None:
    """Raise BenchError where ``fit`` is no way to fit a picture."""
    if fit is not None and fit not in FITS:
        raise unknown("--fit", fit, FITS)


def picture_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files given, and the pictures in the folders given and below them, by name.

    A note counts the other files of a folder. Raises BenchError for a folder without pictures and a missing file.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise BenchError(f"no picture or folder at {path}")
            found.append(path)
            continue
        files = sorted(file for file in path.rglob("*") if file.is_file())
        pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not pictures:
            raise BenchError(f"{path}: a folder without pictures ({' '.join(sorted(SUFFIXES))})")
        if others := len(files) - len(pictures):
            note(f"{path}: {others:,} file{'s' if others > 1 else ''} left out, no picture by name")
        found += pictures
    return found


def read_picture(card: Card, file: Path, fit: str | None = None) -> GivenPicture:
    """Read a picture file for a card.

    Args:
        card: States shape and levels.
        file: The picture.
        fit: None refuses pictures of another shape or off the grid. "levels" rounds values to the nearest level;
            "resize-crop" also scales the shorter side and crops the centre, as the card does with its own pictures.

    Raises:
        BenchError: The picture is unreadable, or must be fitted.
    """
    check_fit(fit)
    height, width = card.shape[1:]
    resize = 0
    if fit == "resize-crop":
        resize = (card.source.resize if isinstance(card.source, Stored) else 0) or max(height, width)
    lossless = card.source.lossless if isinstance(card.source, Stored) else True
    fix = "--fit resize-crop scales and crops it, and the radius then holds for the fitted picture"
    decoded = decode(file, str(file), card.shape, resize, lossless=lossless, fix=fix)
    fitted = []
    if resize and (min(decoded.stored) != resize or decoded.stored != (height, width)):
        fitted.append(f"shorter side scaled to {resize} (bilinear), centre cropped to {height}x{width}")
    integers, rounded = _to_levels(decoded.pixels, card.levels)
    if rounded and fit is None:
        raise BenchError(
            f"{file}: {rounded:,} values are not on the card's grid of {card.levels} levels (8-bit values nearest to "
            f"255 k / {card.levels - 1}); --fit levels rounds them, and the radius then holds for the rounded picture"
        )
    if rounded:
        fitted.append(f"{rounded:,} values rounded to the nearest of {card.levels} levels")
    return GivenPicture(str(file), integers, decoded.changes, tuple(fitted))


def _to_levels(pixels: NDArray[np.uint8], levels: int) -> tuple[NDArray[np.uint8], int]:
    """Return the level nearest to each 8-bit value, and how many values are not those of a level."""
    stored = np.rint(np.arange(levels) * (255 / (levels - 1)))
    integers = np.rint(pixels * ((levels - 1) / 255)).astype(np.uint8)
    return integers, int(np.sum(stored[integers] != pixels))


def read_array(card: Card, values: Any, name: str, fit: str | None = None) -> GivenPicture:
    """Take an array or tensor [C, H, W]: integers 0 .. levels-1, or pixels in [0, 1] on the grid k / (levels - 1).

    ``fit`` "levels" rounds pixels to the grid. Raises BenchError for another shape, range or type, and off the grid.
    """
    check_fit(fit)
    if fit == "resize-crop":
        raise BenchError("--fit resize-crop is for files; resize and crop arrays before, then use levels")
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError) as e:  # of bfloat16, of lists of several lengths
        raise BenchError(f"{name}: {one_line(e)}; give an array of numbers {card.shape}") from None
    if array.shape != card.shape:
        raise BenchError(f"{name}: shape {array.shape}, but the card's is {card.shape}: channels, height, width")
    top = card.levels - 1
    if array.dtype.kind in "iu":
        if array.size and not 0 <= array.min() <= array.max() <= top:
            raise BenchError(
                f"{name}: integers from {array.min()} to {array.max()}, but the card's are 0 to {top}; "
                f"give pixels in [0, 1] as floats"
            )
        return GivenPicture(name, array.astype(np.uint8))
    if array.dtype.kind != "f":
        raise BenchError(f"{name}: values of type {array.dtype}; give integers 0 to {top} or floats in [0, 1]")
    if not (array.min() >= 0 and array.max() <= 1):  # NaN is not
        raise BenchError(f"{name}: pixels from {array.min():g} to {array.max():g}; give them in [0, 1], not normalised")
    steps = array.astype(np.float64) * top
    nearest = np.rint(steps)
    off = int(np.sum(np.abs(steps - nearest) > TOLERANCE))
    if off and fit is None:
        raise BenchError(
            f"{name}: {off:,} values are not on the card's grid k / {top}; fit='levels' rounds them, and the radius "
            f"then holds for the rounded picture"
        )
    fitted = (f"{off:,} values rounded to the nearest of {card.levels} levels",) if off else ()
    return GivenPicture(name, nearest.astype(np.uint8), (), fitted)
