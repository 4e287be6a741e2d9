"""The files of a published folder, and addresses on the hub. Files of a download that are not of the layout are unread.

README.md                            model card
NAME.toml                            text of a study
runs/NAME.study.json                 its results, as ``bench report`` reads them
runs/RUN/run.json
runs/RUN/certificates.jsonl.gz
runs/RUN/attacks.jsonl.gz            where the run was attacked
weights/ENTRY/meta.json              of the cache of trained weights, where asked for
weights/ENTRY/weights.safetensors
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.io import limits
from bench.io.hub import REVISION
from bench.records import attacks, lines
from bench.records.record import RUNS
from bench.records.study import LARGEST, LARGEST_RESULTS, SUFFIX

CARD, WEIGHTS = "README.md", "weights"
LARGEST_META = limits.MB
MOST_FILES = 20_000  # of a published folder
PREFIX = "hub:"

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=,-]{0,199}"  # of a folder or file: no path, no leading dot or dash
_FILES = {  # pattern of a path -> maximum bytes
    rf"{re.escape(CARD)}": limits.MB,
    rf"{_NAME}\.toml": LARGEST,
    rf"{RUNS}/{_NAME}{re.escape(SUFFIX)}": LARGEST_RESULTS,
    rf"{RUNS}/{_NAME}/run\.json": limits.RUN,
    rf"{RUNS}/{_NAME}/{re.escape(lines.COMPRESSED)}": limits.UNPACKED,
    rf"{RUNS}/{_NAME}/{re.escape(attacks.COMPRESSED)}": limits.UNPACKED,
    rf"{WEIGHTS}/{_NAME}/meta\.json": LARGEST_META,
    rf"{WEIGHTS}/{_NAME}/weights\.safetensors": 0,  # of any size that fits into memory, see ``most``
}


def most(path: str) -> int | None:
    """Return the maximum bytes of a file by its path in a published folder; None where the layout has no such file."""
    for pattern, size in _FILES.items():
        if re.fullmatch(pattern, path):
            return size or limits.memory()
    return None


def check_name(name: str, what: str) -> None:
    """Raise BenchError where a folder or file cannot have this name in a published folder."""
    if not re.fullmatch(_NAME, name):
        raise BenchError(
            f"{what}: a published folder cannot hold the name {name!r}; rename it, with letters, digits and ._+=,- "
            f"alone (of a run's folder keep the last nine characters)"
        )


def files(root: Path) -> Iterator[str]:
    """Yield the paths of the layout that a folder has, sorted. Links are followed: the hub's cache consists of them."""
    found = (f.relative_to(root).as_posix() for pattern in ("*", "*/*", "*/*/*") for f in root.glob(pattern))
    yield from sorted(path for path in found if most(path) is not None and (root / path).is_file())


@dataclass(frozen=True)
class Address:
    """A model repository of the hub at a revision."""

    repo: str  # OWNER/NAME
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def address(text: str) -> Address | None:
    """Parse hub:OWNER/NAME[@REVISION]; None where ``text`` is a path. Raises BenchError where it is neither."""
    if re.match(r"https?:/", text):
        raise BenchError(f"{text}: give an address of the hub as hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    if not text.startswith(PREFIX):
        return None
    name = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
    found = re.fullmatch(rf"({name}/{name})(?:@(.*))?", text.removeprefix(PREFIX))
    whole = found is not None and not re.search(r"--|\.\.", found[1]) and not found[1].endswith(".git")
    if found is None or not whole or (found[2] is not None and not re.fullmatch(REVISION, found[2])):
        raise BenchError(f"{text}: no address; write hub:OWNER/NAME, or hub:OWNER/NAME@REVISION with a commit or tag")
    return Address(found[1], found[2])
