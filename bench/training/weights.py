"""The cache of trained weights: each training is done once, and found again by the hash of what decided it.

Every cache entry is a folder. ``weights.safetensors`` holds the tensors; ``meta.json`` the identity, the sha256 of
the weights and the cost of training. Files are written under a temporary name and renamed, so an entry is complete
or absent. ``checkpoint.pt`` holds an unfinished training. Corrupt entries are reported, deleted and retrained.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.errors import BenchError, note, one_line
from bench.io import tensors
from bench.io.files import cache_root, digest, drop_partial, file_sha256, replacing, write_json, writing
from bench.process import watchdog
from bench.process.locks import Lock
from bench.process.runlog import log

FIX = "free space there, or set CERTBENCH_CACHE to another folder; repeat the command to resume"

Weights = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # tensors by name, and what to record of their training


@dataclass(frozen=True)
class Trained:
    """Finished weights: the tensors, the record of their training, and the sha256 of their file."""

    state: dict[str, Tensor]
    meta: dict[str, Any]
    sha256: str


def cached_training(label: str, identity: Mapping[str, Any], train: Callable[[Path], Weights]) -> Trained:
    """Load the weights of ``identity`` from the cache, or train and store them.

    Args:
        label: A readable beginning for the name of the cache entry's folder.
        identity: Everything that decides the weights, as JSON.
        train: Trains, with its checkpoint at the given path. Called only where the cache has no weights, and never by
            two processes at once: the second one waits.
    """
    entry = CacheEntry(label, identity)
    with entry.lock():
        return entry.load() or entry.save(*train(entry.checkpoint))


_listeners: list[list[Path]] = []


@contextmanager
def loaded_entries() -> Iterator[list[Path]]:
    """Collect the folders of the cache entries that are loaded while the context lasts."""
    folders: list[Path] = []
    _listeners.append(folders)
    try:
        yield folders
    finally:
        _listeners.pop()


def stored(sha256: str) -> Path | None:
    """Return the file of the weights of that hash in the cache, None where it has none."""
    metas = cache_root().glob("*/meta.json")
    found = (f for f in metas if f'"sha256": "{sha256}"' in f.read_text(errors="replace"))
    return next((f.with_name("weights.safetensors") for f in found), None)


def stored_where(name: str, wanted: Callable[[Mapping[str, Tensor]], bool]) -> Path | None:
    """Return the first file of weights in the cache's entries called ``name`` whose tensors are the wanted ones.

    Raises BenchError where one cannot be read.
    """
    files = (f.with_name("weights.safetensors") for f in sorted(cache_root().glob(f"{glob.escape(name)}-*/meta.json")))
    return next((f for f in files if f.exists() and wanted(tensors.read(f).tensors)), None)


class CacheEntry:
    """The folder of one identity in the cache."""

    def __init__(self, label: str, identity: Mapping[str, Any]) -> None:
        """``label`` only makes the folder's name readable."""
        self.identity = dict(identity)
        self.folder = cache_root() / f"{label}-{digest(self.identity)[:16]}"

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint of an unfinished training."""
        return self.folder / "checkpoint.pt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the entry's lock. Where another process trains this entry, log a warning and wait for it."""
        with writing(self.folder, FIX):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.folder)
            if not lock.take():
                who = lock.held_by()
                log.warning("another process is training %s; waiting for it%s", self.folder.name, who)
                with watchdog.paused():
                    lock.wait()
        try:
            with writing(self.folder, FIX):
                drop_partial(self.folder)
            yield
        finally:
            lock.release()

    def load(self) -> Trained | None:
        """Read the entry, None where it is unfinished. A corrupt entry is reported and deleted.

        The caller holds the lock. Raises BenchError where a file cannot be read or deleted.
        """
        meta_file, weights = self.folder / "meta.json", self.folder / "weights.safetensors"
        if not meta_file.exists():
            return None
        try:
            meta = json.loads(meta_file.read_text())
            if meta["identity"] != json.loads(json.dumps(self.identity)):
                raise ValueError("meta.json belongs to another training")
            if file_sha256(weights) != meta["sha256"]:
                raise ValueError("weights.safetensors has changed since it was written")
            loaded = Trained(load_file(weights), meta, meta["sha256"])
        except PermissionError as e:
            raise BenchError(f"cannot read the cache: {one_line(e)}; set CERTBENCH_CACHE to another folder") from None
        except Exception as e:
            note(f"corrupt cache entry {self.folder}: {one_line(e)}; deleted, training again")
        else:
            for folders in _listeners:
                folders.append(self.folder)
            return loaded
        with writing(self.folder, FIX):
            meta_file.unlink()  # first: without it there is no entry
            weights.unlink(missing_ok=True)
        return None

    def save(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Trained:
        """Store a finished training and delete its checkpoints. Raises BenchError where it cannot be written."""
        weights = self.folder / "weights.safetensors"
        with writing(self.folder, FIX):
            with replacing(weights) as partial:
                # Clones, since safetensors refuses tensors that share memory (tied weights).
                save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, partial)
            write_json(self.folder / "meta.json", {**meta, "identity": self.identity, "sha256": file_sha256(weights)})
            for checkpoint in self.folder.glob(f"{self.checkpoint.stem}*.pt"):  # those of its stages too
                checkpoint.unlink()
        trained = self.load()
        if trained is None:
            raise BenchError(
                f"{self.folder} returns other bytes than were written; set CERTBENCH_CACHE to another disk"
            )
        return trained
