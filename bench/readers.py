"""Where a card's pictures come from: parquet files, a folder of pictures by class, or scikit-learn's digits.

A reader gives one part of a source (train, and test and validation where the source has its own) as
pictures and labels. Pictures stay encoded, as bytes or files, until rows of them are asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass as checked

from bench import hub, limits
from bench.errors import BenchError, one_line
from bench.hub import REVISION
from bench.pictures import SUFFIXES, Pictures, decode

if TYPE_CHECKING:
    from bench.cards import Card

_STRICT = ConfigDict(extra="forbid")
ROWS = 10_000_000  # of a file, at most
STEP = 8  # rows decoded at a time: what may be taken before it is counted, at most 2 GB each
OVERHEAD = 1000  # bytes that a step takes beside its columns, about
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
class _Stored:
    """Where the data lie: ``folder`` (relative to the card), or $CERTBENCH_DATA/<card name>."""

    folder: str = ""
    resize: Annotated[int, Field(ge=0)] = (
        0  # shorter side, bilinear, then the centre crop of the card's shape; 0: as is
    )


@checked(config=_STRICT, frozen=True, kw_only=True)
class Parquet(_Stored):
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
class Folder(_Stored):
    """Folders with one folder of pictures a class; the classes' order is that of their names."""

    reader: Literal["folder"]
    train: _Inside = "train"
    test: _Inside | Literal[""] = ""  # none: cut from train
    validation: _Inside | Literal[""] = ""


Source = Annotated[Digits | Parquet | Folder, Field(discriminator="reader")]


@dataclass(frozen=True)
class Part:
    """All rows of one part of a source; ``origin`` says in words where they were found."""

    images: NDArray[np.uint8] | Pictures
    labels: NDArray[np.int64]
    origin: str


def has(source: Digits | Parquet | Folder, part: PartName) -> bool:
    """Whether the source has this part of its own."""
    return part == "train" or bool(getattr(source, part, ""))


def read(card: Card, part: PartName) -> Part:
    """One part, which the source must have. Raises BenchError where the data are absent or not as the card says."""
    source = card.source
    if isinstance(source, Parquet):
        found = _parquet(card, source, part)
    elif isinstance(source, Folder):
        found = _folder(card, source, part)
    else:
        found = _digits(card)
    if not len(found.labels):
        raise BenchError(f"card {card.name}: the {part} part ({found.origin}) is empty")
    return found


def class_names(card: Card) -> tuple[str, ...]:
    """The classes of a card that lists none: the folders of its train part. Raises BenchError for other readers."""
    if not isinstance(card.source, Folder):
        raise BenchError(f"card {card.name}: classes: give the list of names, or how many there are")
    return tuple(_subfolders(_root(card, card.source)[0] / card.source.train))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _digits(card: Card) -> Part:
    from sklearn.datasets import load_digits

    if (card.shape, card.levels, len(card.classes)) != ((1, 8, 8), 17, 10):
        raise BenchError(f"card {card.name}: scikit-learn's digits have shape [1, 8, 8], 17 levels and 10 classes")
    data = load_digits()
    return Part(data.images[:, None].astype(np.uint8), data.target.astype(np.int64), "scikit-learn")


def _root(card: Card, source: _Stored) -> tuple[Path, str]:
    """The local data folder, and how a record calls it: without the path, which is the user's own."""
    if source.folder:
        return card.home / source.folder, Path(source.folder).name
    data = os.environ.get("CERTBENCH_DATA")
    if not data:
        raise BenchError(f"card {card.name}: set CERTBENCH_DATA to the folder that holds {card.name}/ with its data")
    return Path(data) / card.name, f"$CERTBENCH_DATA/{card.name}"


def _file(card: Card, source: Parquet, name: str) -> tuple[Path, str]:
    if source.folder or os.environ.get("CERTBENCH_DATA") or not source.hub:
        root, called = _root(card, source)
        if (root / name).is_file():
            return root / name, called
        if not source.hub:
            raise BenchError(f"card {card.name}: no file {root / name}")
    mend = f"set CERTBENCH_DATA to a folder that has {card.name}/{name}"
    path = hub.fetch(source.hub, name, source.revision, "dataset", mend)
    return path, f"hub {source.hub}@{hub.commit(path)}"


def _parquet(card: Card, source: Parquet, part: PartName) -> Part:
    pictures: list[Any] = []
    labels, starts, paths, origins = [], [0], [], []
    room = limits.memory() // 2
    for name in getattr(source, part):
        path, origin = _file(card, source, name)
        images, numbers = _columns(path, source, len(card.classes), room)
        room -= images.nbytes + numbers.nbytes
        pictures.append(images)
        labels.append(numbers)
        starts.append(starts[-1] + len(numbers))
        paths.append(path)
        origins.append(origin)

    def place(row: int) -> tuple[int, int]:
        file = int(np.searchsorted(starts, row, side="right")) - 1
        return file, row - starts[file]

    def encoded(row: int) -> memoryview:
        file, at = place(row)
        return memoryview(pictures[file][at].as_buffer())

    def picture(row: int) -> NDArray[np.uint8]:
        file, at = place(row)
        return decode(encoded(row), f"{paths[file]}: row {at}", card.shape, source.resize)

    return Part(
        Pictures.of(starts[-1], card.shape, picture, encoded, source.resize),
        np.concatenate(labels),
        ", ".join(dict.fromkeys(origins)),
    )


def _columns(path: Path, source: Parquet, classes: int, room: int) -> tuple[Any, NDArray[np.int64]]:
    """The column of encoded pictures and the labels of one file; a path beside the bytes is never opened.

    A file of a few hundred bytes may stand for any number of rows and bytes, and its footer need not say so:
    it is read a few rows at a time, up to ``room`` bytes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            known = file.schema_arrow.names
            for column in (source.image, source.label):
                if known.count(column) != 1:
                    raise BenchError(
                        f"{path}: {known.count(column) or 'no'} columns {column!r}; it has {', '.join(known)}"
                    )
            batches: list[Any] = []
            taken = 0
            if file.metadata.num_rows > ROWS:
                raise BenchError(f"{path}: {file.metadata.num_rows:,} rows, more than {ROWS:,}; split it")
            for batch in file.iter_batches(STEP, columns=[source.image, source.label]):
                taken += batch.nbytes + OVERHEAD
                if taken > room:
                    raise BenchError(
                        f"{path}: its pictures take more than the {room / 1e9:.1f} GB left of half of this machine's "
                        f"memory; leave files out of the card, or use a machine with more"
                    )
                batches.append(batch)
            table = pa.Table.from_batches(batches, None if batches else file.schema_arrow)
    except BenchError:
        raise
    except Exception as e:  # pyarrow raises its own errors, and Python's (UnicodeDecodeError, KeyError, MemoryError)
        raise BenchError(f"{path}: not a readable parquet file: {one_line(e)}; fetch it again") from None
    images, labels = table.column(source.image), table.column(source.label)
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pc.struct_field(images, "bytes")
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise BenchError(f"{path}: column {source.image!r} holds {images.type}, not the bytes of pictures")
    if not pa.types.is_integer(labels.type):
        raise BenchError(f"{path}: column {source.label!r} holds {labels.type}, not whole numbers")
    for name, column in ((source.image, images), (source.label, labels)):
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise BenchError(f"{path}: row {row}: column {name!r} is empty")
    numbers = labels.to_numpy()
    wrong = np.flatnonzero((numbers < 0) | (numbers >= classes))
    if len(wrong):
        row = wrong[0]
        raise BenchError(f"{path}: row {row}: label {numbers[row]} is not among the card's {classes} classes")
    return images, numbers.astype(np.int64)


def _listed(folder: Path, folders: bool = False) -> list[str]:
    """Names in a folder, hidden ones left out, in the order of their characters."""
    try:
        entries = [e.name for e in os.scandir(folder) if not folders or e.is_dir()]
    except OSError as e:
        raise BenchError(f"no folder of pictures at {folder}: {e.strerror}") from None
    return sorted(name for name in entries if not name.startswith("."))


def _subfolders(folder: Path) -> list[str]:
    names = _listed(folder, folders=True)
    if not names:
        raise BenchError(f"{folder}: no folders in it; each class is a folder of pictures")
    return names


def _folder(card: Card, source: Folder, part: PartName) -> Part:
    root, called = _root(card, source)
    base = root / getattr(source, part)
    expected = list(card.classes)
    if card.classes == _numbered(len(expected)):
        # A number of classes was given, not their names: the train part's folders name them, for every part.
        names = _subfolders(root / source.train)
        expected = names if len(names) == len(expected) and set(names) != set(expected) else expected
    found = _subfolders(base)
    if odd := sorted(set(found) ^ set(expected)):
        raise BenchError(f"{base}: {len(found)} class folders, the card has {len(expected)} classes; see {odd[0]!r}")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(expected):
        names = [n for n in _listed(base / name) if Path(n).suffix.lower() in SUFFIXES]
        if not names:
            raise BenchError(f"{base / name}: no pictures in this class folder; known: {' '.join(sorted(SUFFIXES))}")
        files += [f"{name}/{n}" for n in names]
        labels += [label] * len(names)

    def stamp(row: int) -> bytes:
        # As git and make do: reading a hundred gigabytes to find them unchanged would be paid at every command.
        try:
            state = (base / files[row]).stat()
        except OSError as e:
            raise BenchError(f"{base / files[row]}: {e.strerror}") from None
        # A file's name may be bytes that are no text.
        return os.fsencode(files[row]) + f"|{state.st_size}|{state.st_mtime_ns}".encode()

    def picture(row: int) -> NDArray[np.uint8]:
        path = base / files[row]
        return decode(path, str(path), card.shape, source.resize)

    images = Pictures.of(len(files), card.shape, picture, stamp, source.resize)
    return Part(images, np.array(labels, np.int64), f"{called}/{getattr(source, part)}")
