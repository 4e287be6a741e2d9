"""Publish trained weights, and certify with published ones: entries of the cache of trained weights.

Published weights are untrusted. They are never put into the user's cache, where other runs would use them: a check
reads them through a temporary cache of their own. What it then shows is that the certificates are those of these
weights, not that the weights come from the training on record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from bench.errors import BenchError, one_line
from bench.io import limits, tensors
from bench.io.files import cache_root, scratch_cache
from bench.process.console import ConsoleReporter
from bench.process.environment import pick_device
from bench.publishing.contents import TENSORS
from bench.publishing.layout import LARGEST_META, WEIGHTS
from bench.records.record import Record
from bench.records.stored import Amount, Stored
from bench.runs.rebuilding import UntrainedReporter, from_cache
from bench.runs.session import Session
from bench.training.weights import loaded_entries


class Meta(Stored):
    """A meta.json: which training the weights are of, and what is recorded of it."""

    identity: dict[str, Any]
    sha256: str
    train_seconds: Amount | None = None
    probe_seconds: Amount | None = None
    queries: Amount | None = None
    updated: Amount | None = None
    from_base: list[str] = Field(default_factory=list)
    arithmetic: list[str] = Field(default_factory=list)


def entries_of(records: Sequence[Record], device: str, defense: str | None) -> list[Path]:
    """Return the folders of the cache that rebuilding these runs reads: base, shared parts and the defense.

    Raises BenchError where a run cannot be rebuilt here without training.
    """
    found: list[Path] = []
    for record in records:
        session = Session(pick_device(device), record.path.parent, UntrainedReporter(ConsoleReporter(), record))
        with loaded_entries() as folders:
            from_cache(record, session, defense)
        found += folders
    return sorted(set(found))


def published(record: Record) -> Path | None:
    """Return the folder of published weights with which a record can be rebuilt, if there is one beside its runs.

    It has all that were trained for the defense; the base can also be trained again.
    """
    folder = record.path.absolute().parent.parent / WEIGHTS  # of "/" the parent is "/"
    metas = list(folder.glob("*/meta.json")) if folder.is_dir() else []
    return folder if metas and record.identity.defense.trained <= {_read(m).sha256 for m in metas} else None


@contextmanager
def used_alone(folder: Path) -> Iterator[None]:
    """Use published weights in place of the cache while the context lasts. Raises BenchError where one is not valid."""
    with scratch_cache():
        for meta in sorted(folder.glob("*/meta.json")):
            found, file = _read(meta), meta.with_name(TENSORS)
            if tensors.read(file).sha256 != found.sha256:
                raise BenchError(f"{file}: not the file that its meta.json describes; get it again")
            entry = cache_root() / meta.parent.name
            entry.mkdir()
            (entry / TENSORS).symlink_to(file.resolve())
            (entry / "meta.json").write_text(json.dumps(found.as_json()))
        yield


def _read(meta: Path) -> Meta:
    try:
        return Meta.of(json.loads(limits.contents(meta, LARGEST_META)))
    except BenchError as e:
        raise BenchError(f"{meta}: {e}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{meta}: not JSON: {one_line(e)}") from None
