"""Read folders of pictures by class: which folders are classes, their order, and which files are read."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from bench.data.card import Card, root
from bench.data.decoding import SUFFIXES, Crop, Decoded, decode
from bench.data.pictures import Pictures
from bench.data.sources import Folder, Part, PartName, located, numbered, same, some, text
from bench.errors import BenchError, note

READ = " ".join(sorted(SUFFIXES))  # for messages


def class_names(card: Card) -> tuple[str, ...]:
    """Return the classes of a card that lists none: the folders of its train part. Raises BenchError without them."""
    if not isinstance(card.source, Folder):
        raise BenchError(f"card {card.name}: classes: missing; give a list of names, or their number")
    base = located(root(card, card.source)[0], card.source.train)
    names = tuple(text(name) for name in _class_folders(base).values())
    if len(names) < 2:
        raise BenchError(f"{base}: only one class folder, {names[0]!r}; a classifier needs at least two classes")
    return names


def read_folder(card: Card, source: Folder, part: PartName) -> Part:
    """Read one part. Raises BenchError where the folders are not the card's classes, or one has no pictures."""
    folder, called = root(card, source)
    name = getattr(source, part)
    base = located(folder, name)
    classes = _expected(card, located(folder, source.train))
    found = _class_folders(base)
    _check(base, {key: text(entry) for key, entry in found.items()}, classes)
    files: list[str] = []
    labels: list[int] = []
    left_out = _other_entries(base)
    for label, one in enumerate(classes):
        entry = found[same(one)]
        names, others = _listed(base / entry)
        if not names:
            raise BenchError(
                f"{base / entry}: no pictures in this class folder{_left_out(others)}; suffixes that are read: {READ}"
            )
        files += [f"{entry}/{n}" for n in names]
        labels += [label] * len(names)
        left_out += others

    def stamp(row: int) -> bytes:
        # Size and time, as git and make use: reading 100 GB of unchanged pictures at every command would be too slow.
        try:
            state = (base / files[row]).stat()
        except OSError as e:
            raise BenchError(f"{base / files[row]}: {e.strerror}") from None
        # A file's name may be any bytes, not only UTF-8.
        return os.fsencode(files[row]) + f"|{state.st_size}|{state.st_mtime_ns}".encode()

    def picture(row: int, crop: Crop | None) -> Decoded:
        path = base / files[row]
        return decode(path, str(path), card.shape, source.resize, crop, source.lossless)

    remarks = _order(classes) if part == "train" else []
    kinds = Counter(os.path.splitext(file)[1].lower() for file in files)
    if left_out or len(kinds) > 1:
        kept = f"{len(files):,} pictures ({_counted(kinds)})"
        remarks.append(f"{kept}{_left_out(left_out)}; suffixes that are read: {READ}" if left_out else kept)
    for remark in remarks:
        note(f"{base}: {remark}")
    images = Pictures.of(len(files), card.shape, picture, stamp, source.resize)
    return Part(images, np.array(labels, np.int64), "; ".join([f"{called}/{name}", *remarks]), classes)


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that puts 2 before 10 and ignores case, as timm's folder reader does."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def _class_folders(base: Path) -> dict[str, str]:
    """Map the form in which names are compared to each class folder, in natural order, without hidden ones."""
    try:
        entries = [e.name for e in os.scandir(base) if e.is_dir() and not e.name.startswith(".")]
    except OSError as e:
        raise BenchError(f"no folder of pictures at {base}: {e.strerror}") from None
    if not entries:
        raise BenchError(f"{base}: no folders in it; make a folder of pictures for each class")
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    for entry in sorted(entries, key=lambda e: natural(text(e))):
        if found.setdefault(same(text(entry)), entry) != entry:
            raise BenchError(
                f"{base}: two folders {same(text(entry))!r} differ only in their Unicode form; rename or remove one"
            )
        if (other := places.setdefault(os.path.realpath(base / entry), entry)) != entry:
            raise BenchError(f"{base}: {text(other)!r} and {text(entry)!r} are links to one folder; remove one")
    return found


def _expected(card: Card, train: Path) -> tuple[str, ...]:
    """Return the classes in the order of their labels: the card's, or the train folders' if it only numbers them."""
    if not numbered(card.classes):
        return card.classes
    found = {key: text(entry) for key, entry in _class_folders(train).items()}
    if len(found) != len(card.classes):
        empty = [name for name in found.values() if not _listed(located(train, name))[0]]
        named = f"without pictures: {some(empty)}" if empty else some(list(found.values()), 10)
        raise BenchError(
            f"{train}: {len(found)} class folders, the card has {len(card.classes)} classes; {named}; "
            f"correct classes in the card"
        )
    return card.classes if set(found) == set(card.classes) else tuple(found.values())


def _check(base: Path, found: dict[str, str], classes: tuple[str, ...]) -> None:
    """Raise BenchError unless there is exactly one folder for each class."""
    wanted = {same(name): name for name in classes}
    differ = {
        "not in the card": [name for key, name in found.items() if key not in wanted],
        "missing": [name for key, name in wanted.items() if key not in found],
    }
    if any(differ.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in differ.items() if names)
        raise BenchError(f"{base}: {len(found)} class folders, the card has {len(classes)} classes; {listed}")


def _order(classes: tuple[str, ...]) -> list[str]:
    """Return a remark where natural order differs from sorting by characters."""
    characters = sorted(classes)
    if list(classes) == characters or list(classes) != sorted(classes, key=natural):
        return []
    at = next(i for i, name in enumerate(classes) if name != characters[i])
    return [
        f"classes in natural order, as in timm: class {at} is {classes[at]!r} (by characters, as in torchvision, "
        f"it would be {characters[at]!r}); list classes in the card for another order"
    ]


def _listed(folder: Path) -> tuple[list[str], Counter[str]]:
    """List the files with a picture's suffix, sorted by characters, and count the other entries by kind."""
    names, others = [], Counter[str]()
    try:
        for entry in os.scandir(folder):
            suffix = os.path.splitext(entry.name)[1]
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif entry.is_dir():
                others["folders in class folders"] += 1
            elif suffix.lower() in SUFFIXES:
                names.append(entry.name)
            else:
                others[text(suffix) or "without a suffix"] += 1
    except OSError as e:
        raise BenchError(f"no folder of pictures at {folder}: {e.strerror}") from None
    return sorted(names), others


def _other_entries(base: Path) -> Counter[str]:
    """Count the entries next to the class folders, which are not read."""
    hidden, files = "hidden", "outside of class folders"
    entries = [e for e in os.scandir(base) if e.name.startswith(".") or not e.is_dir()]
    return Counter(hidden if e.name.startswith(".") else files for e in entries)


def _left_out(others: Counter[str]) -> str:
    return f", left out: {_counted(others)}" if others else ""


def _counted(kinds: Counter[str]) -> str:
    """Format the counts of each kind, the most frequent first."""
    most = kinds.most_common(8)
    rest = kinds.total() - sum(count for _, count in most)
    return ", ".join([f"{count:,} {kind}" for kind, count in most] + [f"{rest:,} others"] * bool(rest))
