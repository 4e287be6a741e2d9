"""Trained weights, kept by the hash of everything that decided them.

One folder an entry: ``weights.safetensors`` and ``meta.json`` with the identity in clear, the
weights' sha256 and what training cost. Written to a temporary name and renamed, so an entry is
either whole or absent; ``checkpoint.pt`` holds a training that is not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.errors import BenchError, one_line
from bench.runlog import log


def digest(identity: Any) -> str:
    """sha256 of a JSON-able identity, independent of key order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


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


@dataclass(frozen=True)
class Trained:
    """A finished entry: tensors, what is recorded of them, and their hash."""

    state: dict[str, Tensor]
    meta: dict[str, Any]
    sha256: str


def stored(sha256: str) -> bool:
    """Whether weights of that hash are in the cache."""
    return any(json.loads(f.read_text()).get("sha256") == sha256 for f in cache_root().glob("*/meta.json"))


class Entry:
    """The cache's place for one identity; ``label`` only makes the folder's name readable."""

    def __init__(self, label: str, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self.folder = cache_root() / f"{label}-{digest(self.identity)[:16]}"

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished training saves itself."""
        return self.folder / "checkpoint.pt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while training, so that two commands never train the same thing twice; says so where it must wait."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise BenchError(f"cannot write the cache {self.folder}: {e.strerror}; set CERTBENCH_CACHE") from None
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is training %s; waiting for it", self.folder.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def load(self) -> Trained | None:
        """The entry, or None where it is not finished. Raises BenchError when its bytes are not those written."""
        meta_file, weights = self.folder / "meta.json", self.folder / "weights.safetensors"
        if not meta_file.exists():
            return None
        mend = f"delete {self.folder} to train it again"
        try:
            meta = json.loads(meta_file.read_text())
            if file_sha256(weights) != meta["sha256"]:
                raise BenchError(f"corrupt cache entry: {weights} is not the file that was written; {mend}")
            return Trained(load_file(weights), meta, meta["sha256"])
        except BenchError:
            raise
        except Exception as e:
            raise BenchError(f"corrupt cache entry: {meta_file.parent}: {one_line(e)}; {mend}") from None

    def save(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Trained:
        """Store a finished training and drop its checkpoint."""
        weights, partial = self.folder / "weights.safetensors", self.folder / ".weights.partial"
        # Clones, since safetensors refuses tensors that share memory (tied weights).
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, partial)
        partial.replace(weights)
        write_json(self.folder / "meta.json", {**meta, "identity": self.identity, "sha256": file_sha256(weights)})
        for checkpoint in self.folder.glob(f"{self.checkpoint.stem}*.pt"):  # those of its stages too
            checkpoint.unlink()
        trained = self.load()
        assert trained is not None
        return trained
