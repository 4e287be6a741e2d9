"""Trained weights, kept by the hash of everything that decided them.

One folder an entry: ``weights.safetensors`` and ``meta.json`` with the identity in clear, the
weights' sha256 and what training cost. Written to a temporary name and renamed, so an entry is
either whole or absent; ``checkpoint.pt`` holds a training that is not finished. An entry whose bytes
are not those written is said, removed and trained anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.errors import BenchError, note, one_line
from bench.io.files import cache_root, digest, drop_partial, file_sha256, replacing, write_json, writing
from bench.process import watchdog
from bench.process.locks import Lock
from bench.process.runlog import log

MEND = "free space there, or set CERTBENCH_CACHE to another folder; typing the command again resumes it"


@dataclass(frozen=True)
class Trained:
    """A finished entry: tensors, what is recorded of them, and their hash."""

    state: dict[str, Tensor]
    meta: dict[str, Any]
    sha256: str


def stored(sha256: str) -> bool:
    """Whether weights of that hash are in the cache, as far as its entries can be read."""
    return any(f'"sha256": "{sha256}"' in f.read_text(errors="replace") for f in cache_root().glob("*/meta.json"))


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
        """Held while training, so that two commands never train the same thing twice: the second waits, and says so."""
        with writing(self.folder, MEND):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.folder)
            if not lock.take():
                who = lock.held_by()
                log.warning("another process is training %s; waiting for it%s", self.folder.name, who)
                with watchdog.paused():
                    lock.wait()
        try:
            with writing(self.folder, MEND):
                drop_partial(self.folder)
            yield
        finally:
            lock.release()

    def load(self) -> Trained | None:
        """The entry; None where it is not finished. One whose bytes are not those written is said and removed.

        For whoever holds the lock. Raises BenchError where a file cannot be read or removed.
        """
        meta_file, weights = self.folder / "meta.json", self.folder / "weights.safetensors"
        if not meta_file.exists():
            return None
        try:
            meta = json.loads(meta_file.read_text())
            if meta["identity"] != json.loads(json.dumps(self.identity)):
                raise ValueError("meta.json is of another training")
            if file_sha256(weights) != meta["sha256"]:
                raise ValueError("weights.safetensors is not the file that was written")
            return Trained(load_file(weights), meta, meta["sha256"])
        except PermissionError as e:
            raise BenchError(f"cannot read the cache: {one_line(e)}; set CERTBENCH_CACHE") from None
        except Exception as e:
            note(f"corrupt cache entry {self.folder}: {one_line(e)}; it is removed and made anew")
        with writing(self.folder, MEND):
            meta_file.unlink()  # first: without it there is no entry
            weights.unlink(missing_ok=True)
        return None

    def save(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Trained:
        """Store a finished training and drop its checkpoint. Raises BenchError where it cannot be written."""
        weights = self.folder / "weights.safetensors"
        with writing(self.folder, MEND):
            with replacing(weights) as partial:
                # Clones, since safetensors refuses tensors that share memory (tied weights).
                save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, partial)
            write_json(self.folder / "meta.json", {**meta, "identity": self.identity, "sha256": file_sha256(weights)})
            for checkpoint in self.folder.glob(f"{self.checkpoint.stem}*.pt"):  # those of its stages too
                checkpoint.unlink()
        trained = self.load()
        if trained is None:
            raise BenchError(f"{self.folder} gives back other bytes than were written; set CERTBENCH_CACHE")
        return trained
