"""A folder of pictures by class: which folders are the classes, in which order, and which files are read."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from bench.data.card import Card, root
from bench.data.decoding import SUFFIXES, Decoded, decode
from bench.data.pictures import Pictures
from bench.data.sources import Folder, Part, PartName, located, numbered, same, some, text
from bench.errors import BenchError, note

READ = " ".join(sorted(SUFFIXES))


def class_names(card: Card) -> tuple[str, ...]:
    """The classes of a card that lists none: the folders of its train part. Raises BenchError for other readers."""
    if not isinstance(card.source, Folder):
        raise BenchError(f"card {card.name}: classes: give the list of names, or how many there are")
    base = located(root(card, card.source)[0], card.source.train)
    names = tuple(text(name) for name in _class_folders(base).values())
    if len(names) < 2:
        raise BenchError(f"{base}: only one class folder, {names[0]!r}; a classifier needs two classes at least")
    return names


def read_folder(card: Card, source: Folder, part: PartName) -> Part:
    """One part. Raises BenchError where the folders are not the card's classes, or one of them has no pictures."""
    folder, called = root(card, source)
    name = getattr(source, part)
    base = located(folder, name)
    classes = _expected(card, located(folder, source.train))
    found = _class_folders(base)
    _check(base, {key: text(entry) for key, entry in found.items()}, classes)
    files: list[str] = []
    labels: list[int] = []
    left_out = _beside(base)
    for label, one in enumerate(classes):
        entry = found[same(one)]
        names, others = _listed(base / entry)
        if not names:
            raise BenchError(f"{base / entry}: no pictures in this class folder{_but(others)}; read are {READ}")
        files += [f"{entry}/{n}" for n in names]
        labels += [label] * len(names)
        left_out += others

    def stamp(row: int) -> bytes:
        # As git and make do: reading a hundred gigabytes to find them unchanged would be paid at every command.
        try:
            state = (base / files[row]).stat()
        except OSError as e:
            raise BenchError(f"{base / files[row]}: {e.strerror}") from None
        # A file's name may be bytes that are no text.
        return os.fsencode(files[row]) + f"|{state.st_size}|{state.st_mtime_ns}".encode()

    def picture(row: int) -> Decoded:
        path = base / files[row]
        return decode(path, str(path), card.shape, source.resize)

    remarks = _order(classes) if part == "train" else []
    kinds = Counter(os.path.splitext(file)[1].lower() for file in files)
    if left_out or len(kinds) > 1:
        kept = f"{len(files):,} pictures ({_counted(kinds)})"
        remarks.append(f"{kept}{_but(left_out)}; read are {READ}" if left_out else kept)
    for remark in remarks:
        note(f"{base}: {remark}")
    images = Pictures.of(len(files), card.shape, picture, stamp, source.resize)
    return Part(images, np.array(labels, np.int64), "; ".join([f"{called}/{name}", *remarks]), classes)


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts 2 before 10 and regards no case, as timm's folder reader does."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def _class_folders(base: Path) -> dict[str, str]:
    """The folders in a folder by the form they are compared in, hidden ones left out, in natural order."""
    try:
        entries = [e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith(".")]
    except OSError as e:
        raise BenchError(f"no folder of pictures at {base}: {e.strerror}") from None
    if not entries:
        raise BenchError(f"{base}: no folders in it; each class is a folder of pictures")
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    for entry in sorted(entries, key=lambda e: natural(text(e))):
        if found.setdefault(same(text(entry)), entry) != entry:
            raise BenchError(f"{base}: two folders {same(text(entry))!r}, which differ in their Unicode form alone")
        if (other := places.setdefault(os.path.realpath(base / entry), entry)) != entry:
            raise BenchError(f"{base}: {text(other)!r} and {text(entry)!r} are links to one folder; remove one")
    return found


def _expected(card: Card, train: Path) -> tuple[str, ...]:
    """The names of the classes in the order of their labels: the card's, or the train folders' where it gives none."""
    if not numbered(card.classes):
        return card.classes
    found = {key: text(entry) for key, entry in _class_folders(train).items()}
    if len(found) != len(card.classes):
        empty = [name for name in found.values() if not _listed(located(train, name))[0]]
        named = f"without pictures: {some(empty)}" if empty else some(list(found.values()), 10)
        raise BenchError(f"{train}: {len(found)} class folders, the card has {len(card.classes)} classes; {named}")
    return card.classes if set(found) == set(card.classes) else tuple(found.values())


def _check(base: Path, found: dict[str, str], classes: tuple[str, ...]) -> None:
    """Raise BenchError unless the folders are those of the classes."""
    wanted = {same(name): name for name in classes}
    differ = {
        "not among them": [name for key, name in found.items() if key not in wanted],
        "missing": [name for key, name in wanted.items() if key not in found],
    }
    if any(differ.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in differ.items() if names)
        raise BenchError(f"{base}: {len(found)} class folders, the card has {len(classes)} classes; {listed}")


def _order(classes: tuple[str, ...]) -> list[str]:
    """A remark where the natural order of the classes is not that of their characters."""
    characters = sorted(classes)
    if list(classes) == characters or list(classes) != sorted(classes, key=natural):
        return []
    at = next(i for i, name in enumerate(classes) if name != characters[i])
    return [
        f"classes in natural order, as timm has them: class {at} is {classes[at]!r} "
        f"({characters[at]!r} by characters, as torchvision has them); list classes in the card for another order"
    ]


def _listed(folder: Path) -> tuple[list[str], Counter[str]]:
    """The files with a picture's suffix in the order of their characters, and how many entries are of other kinds."""
    names, others = [], Counter[str]()
    try:
        for entry in os.scandir(folder):
            suffix = os.path.splitext(entry.name)[1]
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif entry.is_dir():
                others["nested in class folders"] += 1
            elif suffix.lower() in SUFFIXES:
                names.append(entry.name)
            else:
                others[text(suffix) or "without a suffix"] += 1
    except OSError as e:
        raise BenchError(f"no folder of pictures at {folder}: {e.strerror}") from None
    return sorted(names), others


def _beside(base: Path) -> Counter[str]:
    """What lies beside the class folders and is not read."""
    hidden, files = "hidden", "beside the class folders"
    entries = [e for e in os.scandir(base) if e.name.startswith(".") or not e.is_dir()]
    return Counter(hidden if e.name.startswith(".") else files for e in entries)


def _but(others: Counter[str]) -> str:
    return f", left out: {_counted(others)}" if others else ""


def _counted(kinds: Counter[str]) -> str:
    """How many there are of each kind, the most frequent first."""
    most = kinds.most_common(8)
    rest = kinds.total() - sum(count for _, count in most)
    return ", ".join([f"{count:,} {kind}" for kind, count in most] + [f"{rest:,} others"] * bool(rest))
