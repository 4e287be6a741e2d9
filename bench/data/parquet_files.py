"""Read Parquet files of encoded pictures, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.data.card import Card, root
from bench.data.decoding import Crop, Decoded, decode
from bench.data.pictures import Pictures
from bench.data.sources import Parquet, Part, PartName, located, numbered, same, some
from bench.errors import BenchError, note, one_line
from bench.io import hub, limits

ROWS = 10_000_000  # maximum rows of a file
STEP = 8  # rows read at a time, at most 2 GB each, before their size is checked
OVERHEAD = 1000  # approximate bytes of a step besides its columns


def read_parquet(card: Card, source: Parquet, part: PartName) -> Part:
    """Read one part. Raises BenchError where a file is missing or damaged, or its classes differ from the card's."""
    pictures: list[Any] = []
    labels, starts, paths, origins, named = [], [0], [], [], []
    room = limits.memory() // 2
    for name in getattr(source, part):
        path, origin = _file(card, source, name)
        images, numbers, names = _columns(path, source, room)
        room -= images.nbytes + numbers.nbytes
        place_of, names = _places(path, names, card.classes)
        classes = len(place_of)
        if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= classes))):
            row = wrong[0]
            raise BenchError(
                f"{path}: row {row}: label {numbers[row]} is not among the card's {classes} classes; "
                f"correct classes in the card"
            )
        if place_of.tolist() != list(range(classes)):
            note(f"{path}: {(remark := _moved(names, place_of))}")
            origin += f" ({name}: {remark})"
        pictures.append(images)
        labels.append(place_of[numbers])
        starts.append(starts[-1] + len(numbers))
        paths.append(path)
        origins.append(origin)
        named.append(names)

    def place(row: int) -> tuple[int, int]:
        file = int(np.searchsorted(starts, row, side="right")) - 1
        return file, row - starts[file]

    def encoded(row: int) -> memoryview:
        file, at = place(row)
        return memoryview(pictures[file][at].as_buffer())

    def picture(row: int, crop: Crop | None) -> Decoded:
        file, at = place(row)
        return decode(encoded(row), f"{paths[file]}: row {at}", card.shape, source.resize, crop, source.lossless)

    return Part(
        Pictures.of(starts[-1], card.shape, picture, encoded, source.resize),
        np.concatenate(labels),
        ", ".join(dict.fromkeys(origins)),
        agreed(card, named),
    )


def agreed(card: Card, named: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names of the classes that several files agree on, if any. Raises BenchError where files differ."""
    known = list(dict.fromkeys(names for names in named if names))
    if len(known) > 1:
        at = next(i for i, (one, other) in enumerate(zip(*known[:2], strict=True)) if one != other)
        raise BenchError(
            f"card {card.name}: its files name class {at} {known[0][at]!r} and {known[1][at]!r}; "
            f"list the names under classes in the card, so that labels are matched by name"
        )
    return known[0] if known else ()


def _file(card: Card, source: Parquet, name: str) -> tuple[Path, str]:
    if source.folder or os.environ.get("CERTBENCH_DATA") or not source.hub:
        folder, called = root(card, source)
        if (path := located(folder, name)).is_file():
            return path, called
        if not source.hub:
            raise BenchError(f"card {card.name}: no file {folder / name}; put it there, or name a hub in its [source]")
    fix = f"set CERTBENCH_DATA to a folder that has {card.name}/{name}"
    path = hub.fetch(source.hub, name, source.revision, "dataset", fix)
    return path, f"hub {source.hub}@{hub.commit(path)}"


def _columns(path: Path, source: Parquet, room: int) -> tuple[Any, NDArray[np.int64], tuple[str, ...]]:
    """Read the encoded pictures, labels and class names of one file; a path stored with a picture is never opened.

    A file of a few hundred bytes may expand to any number of rows and bytes, whatever its footer states, so it is read
    a few rows at a time, up to ``room`` bytes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        # Opened by Python, since pyarrow refuses paths that are not UTF-8.
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            known = file.schema_arrow.names
            names = _class_names(file.schema_arrow.metadata or {}, source.label)
            for column in (source.image, source.label):
                if known.count(column) != 1:
                    raise BenchError(
                        f"{path}: {known.count(column) or 'no'} columns {column!r}; it has {', '.join(known)}: "
                        f"name one as image or label in the card's [source]"
                    )
            batches: list[Any] = []
            taken = 0
            if file.metadata.num_rows > ROWS:
                raise BenchError(f"{path}: {file.metadata.num_rows:,} rows, more than {ROWS:,}; split it")
            for batch in file.iter_batches(STEP, columns=[source.image, source.label]):
                taken += batch.nbytes + OVERHEAD
                if taken > room:
                    raise BenchError(
                        f"{path}: its pictures take more than {room / 1e9:.1f} GB, what is left of half of this "
                        f"machine's memory; leave files out of the card, or use a machine with more memory"
                    )
                batches.append(batch)
            table = pa.Table.from_batches(batches, None if batches else file.schema_arrow)
    except BenchError:
        raise
    except Exception as e:  # pyarrow raises its own and Python's errors (UnicodeDecodeError, KeyError, MemoryError)
        raise BenchError(f"{path}: not a readable parquet file: {one_line(e)}; fetch it again") from None
    images, labels = table.column(source.image), table.column(source.label)
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pc.struct_field(images, "bytes")
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise BenchError(
            f"{path}: column {source.image!r} holds {images.type}, not the bytes of pictures; set image in the card"
        )
    if not pa.types.is_integer(labels.type):
        raise BenchError(
            f"{path}: column {source.label!r} holds {labels.type}, not whole numbers; set label in the card"
        )
    for name, column in ((source.image, images), (source.label, labels)):
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise BenchError(f"{path}: row {row}: column {name!r} is empty; remove the row")
    return images, labels.to_numpy(), names


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Return the names of a column's ClassLabel from the metadata of Hugging Face's datasets; empty without any."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _places(path: Path, names: tuple[str, ...], classes: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Map the file's labels to the card's by name, and return the names of the classes, if any.

    Raises BenchError where both name the classes and the names differ.
    """
    for form in (same, _loose):
        at = {form(name): label for label, name in enumerate(classes)}
        if len(at) == len(classes) == len(names) and at.keys() == {form(name) for name in names}:
            return np.array([at[form(name)] for name in names], np.int64), classes
    if names and (len(names) != len(classes) or not numbered(classes)):
        missing = sorted(set(classes) - set(names))
        more = sorted(set(names) - set(classes))
        raise BenchError(
            f"{path}: its labels name {len(names)} classes, the card has {len(classes)} classes; "
            f"only in the file: {some(more) or 'none'}; only in the card: {some(missing) or 'none'}; "
            f"correct classes in the card"
        )
    return np.arange(len(classes)), names


def _moved(classes: tuple[str, ...], place_of: NDArray[np.int64]) -> str:
    at = int(np.flatnonzero(place_of != np.arange(len(place_of)))[0])
    to = place_of[at]
    return f"labels matched to the card's classes by name: its {at} is the card's {to}, {classes[to]!r}"


def _loose(name: str) -> str:
    return same(name).casefold().strip()
