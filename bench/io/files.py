"""Files written atomically, their hashes, and the cache's folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError

from bench.errors import BenchError, one_line

_PARTIAL = ".partial-"  # how the name of a file that is being written begins


def digest(identity: Any) -> str:
    """sha256 of a JSON-able identity, independent of key order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write the new file to: it replaces the old one at the end, or leaves nothing behind.

    A reader sees the old file or the new one, never a part. Raises OSError where it cannot be written.
    """
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")  # the suffix stays, which tells figures their kind
    try:
        yield partial
        with partial.open("rb+") as f:
            os.fsync(f.fileno())
        partial.replace(path)
    except SafetensorError as e:
        raise OSError(None, one_line(e), str(path)) from e
    finally:
        partial.unlink(missing_ok=True)


def drop_partial(folder: Path) -> None:
    """Remove what killed processes were writing; for whoever holds the folder's lock."""
    for file in folder.glob(f"{_PARTIAL}*"):
        file.unlink()


@contextmanager
def writing(where: Path | str, mend: str) -> Iterator[None]:
    """Turn a failed write into one line that names the place and the way out."""
    try:
        yield
    except OSError as e:
        raise BenchError(f"cannot write {where}: {e.strerror or one_line(e)}; {mend}") from None


def write_text(path: Path, text: str) -> None:
    """Write atomically. A name in a record may be no text at all (half of a surrogate pair); it is written escaped."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """The same, of a JSON-able value."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def cache_root() -> Path:
    """``$CERTBENCH_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("CERTBENCH_CACHE") or platformdirs.user_cache_dir("certbench"))


@contextmanager
def scratch_cache() -> Iterator[None]:
    """A cache that is empty and thrown away afterwards, in place of the user's."""
    before = os.environ.get("CERTBENCH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CERTBENCH_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["CERTBENCH_CACHE"]
            if before is not None:
                os.environ["CERTBENCH_CACHE"] = before
