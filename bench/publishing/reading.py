"""Find published runs: download them from the hub, or take the folder that is named."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from bench.errors import BenchError, note
from bench.io import hub
from bench.publishing import layout
from bench.publishing.layout import CARD, WEIGHTS
from bench.records.record import RUNS


@dataclass(frozen=True)
class Place:
    """A folder with runs; ``source`` and ``revision``: the address and commit it is from; None: it was local."""

    path: Path
    source: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.source else str(self.path)


def locate(place: str | PathLike[str], weights: bool = False) -> Place:
    """Return the local folder of a path, or of hub:OWNER/NAME[@REVISION], whose runs are downloaded.

    Downloads are untrusted: only files of the layout, each within its limit. They stay in the hub's cache, under their
    commit. ``weights``: download published weights too.

    Raises:
        BenchError: No address, no such repository, or none with runs; a file is too large.
    """
    address = layout.address(fspath(place))
    if address is None:
        return Place(Path(place))
    listed = hub.listing(address.repo, address.revision or "main")
    _check(str(address), listed)
    parts = (f"{RUNS}/", f"{WEIGHTS}/") if weights else (f"{RUNS}/",)
    check_sizes(address, listed, listed.files)
    root = download(address, listed, [path for path in listed.files if path.startswith(parts)])
    assert root is not None, "_check found a run"
    return Place(root, f"{layout.PREFIX}{address.repo}", listed.commit)


def check_sizes(address: layout.Address, listed: hub.Listing, paths: Iterable[str]) -> None:
    """Raise BenchError where one of these files is larger than the layout allows."""
    for path in paths:
        limit, size = layout.most(path), listed.files[path]
        if limit is not None and size > limit:
            raise BenchError(f"{address}: {path} has {size:,} bytes, and the limit for such a file is {limit:,}")


def download(address: layout.Address, listed: hub.Listing, paths: Iterable[str]) -> Path | None:
    """Download those of some files that the layout has into the hub's cache; return their folder, None without any."""
    root = None
    for path in paths:
        if layout.most(path) is not None:
            root = hub.fetch(address.repo, path, listed.commit, "model").parents[path.count("/")]
    return root


def _check(address: str, listed: hub.Listing) -> None:
    """Check a repository's files by name; those that are not of the layout are named in a note."""
    if len(listed.files) > layout.MOST_FILES:
        raise BenchError(
            f"{address}: {len(listed.files):,} files; a published folder has at most {layout.MOST_FILES:,}"
        )
    if not any(
        path.startswith(f"{RUNS}/") and path.endswith("/run.json") for path in filter(layout.most, listed.files)
    ):
        raise BenchError(f"{address}: no runs there ({RUNS}/NAME/run.json); bench publish makes such a repository")
    others = sorted(p for p in listed.files if layout.most(p) is None and p not in (CARD, ".gitattributes"))
    if others:
        note(f"{address}: {len(others)} files are not of a published folder and are not read, {others[0]} first")
