"""What a card says of where its pictures are, and how a part of such a source is handed on."""

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
    # A card may come from anyone: what it names lies below its data folder. Links the user put there are followed.
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
    """Where the data lie: ``folder`` (relative to the card), or $CERTBENCH_DATA/<card name>."""

    folder: str = ""
    resize: Annotated[int, Field(ge=0)] = (
        0  # shorter side, bilinear, then the centre crop of the card's shape; 0: as is
    )


@checked(config=_STRICT, frozen=True, kw_only=True)
class Parquet(Stored):
    """Files with a column of encoded pictures, bare or as {bytes, path}, and one of labels 0 .. classes-1."""

    reader: Literal["parquet"]
    train: Annotated[_Files, Field(min_length=1)]
    test: _Files = ()  # none: cut from train
    validation: _Files = ()
    image: str = "image"
    label: str = "label"
    hub: str = ""  # a data set of the hub, for files that are not in the folder
    revision: Annotated[str, StringConstraints(pattern=REVISION)] = "main"


@checked(config=_STRICT, frozen=True, kw_only=True)
class Folder(Stored):
    """Folders with one folder of pictures a class, in the natural order of their names (2 before 10)."""

    reader: Literal["folder"]
    train: _Inside = "train"
    test: _Inside | Literal[""] = ""  # none: cut from train
    validation: _Inside | Literal[""] = ""


Source = Annotated[Digits | Parquet | Folder, Field(discriminator="reader")]


@dataclass(frozen=True)
class Part:
    """All rows of one part of a source.

    ``origin`` says in words where they were found, and what was left out or reordered. ``names`` are the classes'
    names in the data, in the order of the labels; empty where the data name none.
    """

    images: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64]
    origin: str
    names: tuple[str, ...] = ()


def has(source: Digits | Parquet | Folder, part: PartName) -> bool:
    """Whether the source has this part of its own."""
    return part == "train" or bool(getattr(source, part, ""))


def located(folder: Path, name: str) -> Path:
    """The path of ``name`` in a folder: its letters may be stored in another Unicode form.

    Names are stored in UTF-8, whatever the locale: under an ASCII one Python would refuse other letters.
    """
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    paths = [folder / os.fsdecode(form.encode("utf-8", "surrogateescape")) for form in forms]
    return next((path for path in paths if path.exists()), paths[0])


def text(name: str) -> str:
    """The text of a name that the file system gave, whatever the locale. Bytes that are no UTF-8 stay surrogates."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def same(name: str) -> str:
    """The Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def numbered(classes: tuple[str, ...]) -> bool:
    """Whether a card gives the number of its classes rather than their names."""
    return classes == tuple(map(str, range(len(classes))))


def some(names: list[str], most: int = 5) -> str:
    """A few of many names, quoted."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
