"""Read a CSV file with one row for each picture, as the WILDS data sets have."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from bench.data.card import Card, root
from bench.data.decoding import Crop, Decoded, decode
from bench.data.pictures import Pictures
from bench.data.sources import Csv, Part, PartName, inside, located, numbered, place, same, some
from bench.errors import BenchError, note
from bench.io import limits

LARGEST = 512 * limits.MB  # maximum size of a CSV file; WILDS has 30 MB for 456,000 pictures
_Row = dict[str, str]  # column -> value
_COLUMN = re.compile(r"\{([^{}]+)\}")


@dataclass
class _Listed:
    """The pictures of one part, in the order of the file."""

    files: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    unused: int = 0  # rows of the file that are in no part


def read_csv(card: Card, source: Csv, part: PartName) -> Part:
    """Read one part: the rows with the values that the card states, in the order of the file.

    Raises BenchError where the file lacks a column, a row is in two parts, or a label is none of the card's classes.
    """
    folder, called = root(card, source)
    path = located(folder, source.file)
    listed = _listed(card, source, part, path)
    files = listed.files

    def stamp(row: int) -> bytes:
        file = located(folder, files[row])
        try:  # size and time, as for folders of pictures
            state = file.stat()
        except OSError as e:
            raise BenchError(f"{file}: {e.strerror}; {path} names it") from None
        return os.fsencode(files[row]) + f"|{state.st_size}|{state.st_mtime_ns}".encode()

    def picture(row: int, crop: Crop | None) -> Decoded:
        file = located(folder, files[row])
        return decode(file, str(file), card.shape, source.resize, crop, source.lossless)

    origin = f"{called}/{source.file}: {_described(place(source, part))}"
    if listed.unused and part == "train":
        note(f"{path}: {(remark := f'rows in no part of the card: {listed.unused:,}')}")
        origin += f"; {remark}"
    images = Pictures.of(len(files), card.shape, picture, stamp, source.resize)
    domains = np.array(listed.domains) if source.domain else None
    return Part(images, np.array(listed.labels, np.int64), origin, domains=domains)


def _listed(card: Card, source: Csv, part: PartName, path: Path) -> _Listed:
    parts = {"train": source.train, "test": source.test, "validation": source.validation, **source.parts}
    stated = {name: rows for name, rows in parts.items() if rows}
    label_of = _labels(card.classes)
    found = _Listed()
    seen: dict[str, int] = {}
    for line, row in _rows(path, source, stated):
        owners = [name for name, wanted in stated.items() if all(row[column] in wanted[column] for column in wanted)]
        if not owners:
            found.unused += 1
            continue
        if len(owners) > 1:
            raise BenchError(
                f"{path}: line {line} is in {owners[0]} and in {owners[1]}; correct the card's columns of the two"
            )
        file = _COLUMN.sub(partial(_value, row), source.path)
        if (other := seen.setdefault(file, line)) != line:
            raise BenchError(f"{path}: lines {other} and {line} name one picture, {file!r}; remove one of them")
        if owners != [part]:
            continue
        try:
            found.files.append(inside(file))
        except ValueError as e:
            raise BenchError(f"{path}: line {line}: {e}") from None
        if (label := label_of.get(same(row[source.label]))) is None:
            raise BenchError(
                f"{path}: line {line}: {source.label} is {row[source.label]!r}, none of the card's "
                f"{len(card.classes)} classes ({some(list(card.classes))}); correct classes or label in the card"
            )
        found.labels.append(label)
        if source.domain:
            found.domains.append(row[source.domain])
    return found


def _value(row: dict[str, str], column: re.Match[str]) -> str:
    return row[column[1]]


def _rows(path: Path, source: Csv, parts: dict[PartName, dict[str, tuple[str, ...]]]) -> Iterator[tuple[int, _Row]]:
    """Yield the rows of the file, each with its line number and the columns that the card names."""
    needed = dict.fromkeys([*_COLUMN.findall(source.path), source.label, *itertools.chain(*parts.values())])
    if source.domain:
        needed[source.domain] = None
    try:
        text = limits.contents(path, LARGEST).decode("utf-8-sig")
    except OSError as e:
        raise BenchError(f"{path}: {e.strerror}; it lists the pictures and their parts") from None
    except UnicodeDecodeError as e:
        raise BenchError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        titles = next(lines, [])
        for column in needed:
            if titles.count(column) != 1:
                raise BenchError(
                    f"{path}: {titles.count(column) or 'no'} columns {column!r}; it has {some(titles, 20) or 'none'}: "
                    f"correct the card's [source]"
                )
        places = [(column, titles.index(column)) for column in needed]
        for row in lines:
            if len(row) != len(titles):
                raise BenchError(
                    f"{path}: line {lines.line_num}: {len(row)} values for {len(titles)} columns; correct the line"
                )
            yield lines.line_num, {column: row[at] for column, at in places}
    except csv.Error as e:
        raise BenchError(f"{path}: line {lines.line_num}: not CSV: {e}; get the file again") from None


def _labels(classes: tuple[str, ...]) -> dict[str, int]:
    """Map names of the classes to labels; their numbers too, unless a class is named by a number."""
    names = {same(name): label for label, name in enumerate(classes)}
    if numbered(classes) or not any(name.isdecimal() for name in classes):
        names |= {str(label): label for label in range(len(classes))}
    return names


def _described(rows: dict[str, tuple[str, ...]]) -> str:
    return " and ".join(f"{column} {' or '.join(values)}" for column, values in rows.items())
