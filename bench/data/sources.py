"""The schemas of a card's source, and helpers for the names of files and classes."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PositiveInt, StringConstraints
from pydantic.dataclasses import dataclass as checked

from bench.data.pictures import Pictures
from bench.io.hub import REVISION

_STRICT = ConfigDict(extra="forbid")
PartName = str  # one that SPLIT matches
# Names of splits: the usual three, and named test parts. They are parts of file names, and records are untrusted.
_WORDS = r"(-[a-z0-9_]{1,40}){1,4}"
SPLIT = rf"^(train|validation|test({_WORDS})?)$"
CORRUPTION = r"^[a-z0-9_]{1,40}$"
TestPart = Annotated[str, StringConstraints(pattern=rf"^test{_WORDS}$")]


def inside(path: str) -> str:
    """Return a path that stays below the data folder, else raise ValueError: cards and data are untrusted input.

    Links that the user made there are followed.
    """
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path:
        raise ValueError(f"{path!r} must be a path below the data folder, without ..")
    return path


def _strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _value(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _values(value: Any) -> Any:
    return tuple(map(_value, value)) if isinstance(value, list) else (_value(value),)


_Inside = Annotated[str, AfterValidator(inside)]
_Archive = Annotated[str, StringConstraints(pattern=r"^(|[A-Za-z0-9][A-Za-z0-9_.-]*)$")]  # a folder, not a path
_Files = Annotated[tuple[_Inside, ...], BeforeValidator(_strings)]


@checked(config=_STRICT, frozen=True)
class Digits:
    """scikit-learn's bundled digits."""

    reader: Literal["sklearn:digits"]


@checked(config=_STRICT, frozen=True)
class Stored:
    """Data in ``folder`` (relative to the card), or in $CERTBENCH_DATA/<card name>, or $CERTBENCH_DATA/``archive``."""

    folder: str = ""  # relative to the card; empty: the card's name in $CERTBENCH_DATA
    archive: _Archive = ""  # the folder's name as published, in $CERTBENCH_DATA
    # Scale the shorter side to this (bilinear), then crop the centre to the card's shape. 0: pictures have the shape.
    resize: Annotated[int, Field(ge=0)] = 0
    lossless: bool = False  # the data set's own pictures are lossless; a copy stored as JPEG is reported
    rows: dict[PartName, PositiveInt] = field(
        default_factory=dict
    )  # of the complete data set; a copy of fewer is reported


@checked(config=_STRICT, frozen=True, kw_only=True)
class Parquet(Stored):
    """Parquet files with a column of encoded pictures, as bytes or {bytes, path}, and one of labels 0 .. classes-1."""

    reader: Literal["parquet"]
    train: Annotated[_Files, Field(min_length=1)]  # one file or several
    test: _Files = ()  # empty: cut from train
    validation: _Files = ()  # empty: cut from train
    parts: dict[TestPart, Annotated[_Files, Field(min_length=1)]] = field(default_factory=dict)  # named test parts
    image: str = "image"  # a column
    label: str = "label"  # a column
    hub: str = ""  # a data set on the hub, for files that are not in the folder
    revision: Annotated[str, StringConstraints(pattern=REVISION)] = "main"


@checked(config=_STRICT, frozen=True, kw_only=True)
class Folder(Stored):
    """Folders with one folder of pictures for each class, in the natural order of their names (2 before 10)."""

    reader: Literal["folder"]
    train: _Inside = "train"  # a folder below the data folder; "." is that folder itself
    test: _Inside | Literal[""] = ""  # empty: cut from train
    validation: _Inside | Literal[""] = ""  # empty: cut from train
    parts: dict[TestPart, _Inside] = field(default_factory=dict)  # named test parts


# Rows of a table: those with one of the given values in each of the given columns.
_Rows = dict[Annotated[str, StringConstraints(min_length=1)], Annotated[tuple[str, ...], BeforeValidator(_values)]]


@checked(config=_STRICT, frozen=True, kw_only=True)
class Csv(Stored):
    """A CSV file with one row for each picture: values that give its path, its label, and its part."""

    reader: Literal["csv"]
    path: Annotated[str, StringConstraints(min_length=1)]  # of a picture, with columns in braces: "train/{filename}"
    label: str  # a column of class names or numbers
    train: Annotated[_Rows, Field(min_length=1)]  # values by column
    test: _Rows = field(default_factory=dict)  # empty: cut from train, unless there are named test parts
    validation: _Rows = field(default_factory=dict)  # empty: cut from train
    parts: dict[TestPart, Annotated[_Rows, Field(min_length=1)]] = field(default_factory=dict)  # named test parts
    file: _Inside = "metadata.csv"  # the table
    domain: str = ""  # a column that names where a picture comes from, such as a hospital; counted in records


Source = Annotated[Digits | Parquet | Folder | Csv, Field(discriminator="reader")]


@checked(config=_STRICT, frozen=True, kw_only=True)
class Corruptions:
    """Corrupted copies of test images as in CIFAR-10-C: an array NAME.npy for each corruption, and one of labels.

    An array holds uint8 [severities x images, H, W, C], the mildest severity first. The folder is ``folder`` (relative
    to the card), or $CERTBENCH_DATA/<card name>-c, or $CERTBENCH_DATA/``archive``.
    """

    names: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=CORRUPTION)], ...], Field(min_length=1, max_length=100)
    ]
    severities: Annotated[int, Field(ge=1, le=100)] = 5
    labels: _Inside = "labels.npy"
    folder: str = ""
    archive: _Archive = ""

    def parts(self) -> dict[PartName, tuple[str, int]]:
        """Return the corruption and severity of each part, by the part's name."""
        levels = range(1, self.severities + 1)
        return {f"test-{name}-{level}": (name, level) for name in self.names for level in levels}


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
    domains: NDArray[np.str_] | None = None  # where each row comes from; None: the data do not say


def has(source: Digits | Parquet | Folder | Csv, part: PartName) -> bool:
    """Return whether the source has its own part of that name."""
    return part == "train" or (not isinstance(source, Digits) and bool(place(source, part)))


def place(source: Parquet | Folder | Csv, part: PartName) -> Any:
    """Return what the source states of a part: files, a folder or rows; empty for a part that it does not have."""
    if part in ("train", "validation", "test"):
        return getattr(source, part)
    return source.parts.get(part, ())


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
