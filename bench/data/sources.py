"""The schemas of a card's source, and helpers for the names of files and classes."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass as checked

from bench.data.pictures import Pictures
from bench.io.hub import REVISION

_STRICT = ConfigDict(extra="forbid")
PartName = Literal["train", "validation", "test"]


def _inside(path: str) -> str:
    # Cards are untrusted input, so paths must stay below the data folder. Links that the user made there are followed.
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
        raise ValueError(f"{path!r} must be a path below the data folder, without ..")
    return path


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


_Inside = Annotated[str, AfterValidator(_inside)]
_Files = Annotated[tuple[_Inside, ...], BeforeValidator(_strings)]


@checked(config=_STRICT, frozen=True)
class Digits:
    """scikit-learn's bundled digits."""

    reader: Literal["sklearn:digits"]


@checked(config=_STRICT, frozen=True)
class Stored:
    """Data in ``folder`` (relative to the card), or in $CERTBENCH_DATA/<card name>."""

    folder: str = ""
    # Scale the shorter side to this (bilinear), then crop the centre to the card's shape. 0: pictures have the shape.
    resize: Annotated[int, Field(ge=0)] = 0
    lossless: bool = False  # the data set's own pictures are lossless; a copy stored as JPEG is reported


@checked(config=_STRICT, frozen=True, kw_only=True)
class Parquet(Stored):
    """Parquet files with a column of encoded pictures, as bytes or {bytes, path}, and one of labels 0 .. classes-1."""

    reader: Literal["parquet"]
    train: Annotated[_Files, Field(min_length=1)]
    test: _Files = ()  # empty: cut from train
    validation: _Files = ()
    image: str = "image"
    label: str = "label"
    hub: str = ""  # a data set on the hub, for files that are not in the folder
    revision: Annotated[str, StringConstraints(pattern=REVISION)] = "main"


@checked(config=_STRICT, frozen=True, kw_only=True)
class Folder(Stored):
    """Folders with one folder of pictures for each class, in the natural order of their names (2 before 10)."""

    reader: Literal["folder"]
    train: _Inside = "train"
    test: _Inside | Literal[""] = ""  # empty: cut from train
    validation: _Inside | Literal[""] = ""


Source = Annotated[Digits | Parquet | Folder, Field(discriminator="reader")]


@dataclass(frozen=True)
class Part:
    """All rows of one part of a source.

    ``origin`` describes where they are, and what was left out or reordered. ``names`` are the names of the classes in
    the data, in the order of the labels; empty where the data have none.
    """

    images: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64]
    origin: str
    names: tuple[str, ...] = ()


def has(source: Digits | Parquet | Folder, part: PartName) -> bool:
    """Return whether the source has its own part of that name."""
    return part == "train" or bool(getattr(source, part, ""))


def located(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in a folder, where it may be stored in another Unicode form.

    Names are encoded in UTF-8 whatever the locale, since Python refuses other letters under an ASCII locale.
    """
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    paths = [folder / os.fsdecode(form.encode("utf-8", "surrogateescape")) for form in forms]
    return next((path for path in paths if path.exists()), paths[0])


def text(name: str) -> str:
    """Decode a name from the file system as UTF-8, whatever the locale. Invalid bytes stay surrogates."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def same(name: str) -> str:
    """Return the Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def numbered(classes: tuple[str, ...]) -> bool:
    """Return whether a card states the number of its classes instead of their names."""
    return classes == tuple(map(str, range(len(classes))))


def some(names: list[str], most: int = 5) -> str:
    """Quote the first of many names, and count the rest."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
