"""Atomic writes, hashes of files, and the cache's folder."""

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

_PARTIAL = ".partial-"  # prefix of the temporary name of a file


def digest(identity: Any) -> str:
    """Return the sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; at the end rename it to ``path``, or delete it after an error.

    A reader sees the old file or the new one, never a part. Raises OSError where it cannot be written.
    """
    # The suffix stays, since Matplotlib chooses the format by it.
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
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
    """Delete temporary files of killed processes. The caller holds the folder's lock."""
    for file in folder.glob(f"{_PARTIAL}*"):
        file.unlink()


@contextmanager
def writing(where: Path | str, fix: str) -> Iterator[None]:
    """Turn a failed write into a BenchError that names the place and how to fix it."""
    try:
        yield
    except OSError as e:
        raise BenchError(f"cannot write {where}: {e.strerror or one_line(e)}; {fix}") from None


def write_text(path: Path, text: str) -> None:
    """Write text atomically; lone surrogates, from names that are not UTF-8, are escaped."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def cache_root() -> Path:
    """Return ``$CERTBENCH_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("CERTBENCH_CACHE") or platformdirs.user_cache_dir("certbench"))


@contextmanager
def scratch_cache() -> Iterator[None]:
    """Use an empty temporary cache while the context lasts."""
    before = os.environ.get("CERTBENCH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CERTBENCH_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["CERTBENCH_CACHE"]
            if before is not None:
                os.environ["CERTBENCH_CACHE"] = before
