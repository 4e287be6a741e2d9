"""Commands that delete: ``bench cache`` and ``bench rm``."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import AsJson, print_table
from bench.errors import BenchError, shown
from bench.io.files import cache_root, writing
from bench.process.locks import Lock
from bench.process.runlog import NAME, is_locked
from bench.records import lines

app = typer.Typer(rich_markup_mode=None)
cache = typer.Typer(rich_markup_mode=None, help="List and delete trained weights that runs would use again.")
app.add_typer(cache, name="cache")

DAY = 86_400
_OF_A_RUN = {"run.json", lines.NAME, lines.COMPRESSED, NAME, ".lock", ".lock-holder"}


@dataclass(frozen=True)
class Entry:
    """An entry of the cache; ``written``: when a file of it last was, in UTC."""

    entry: str
    state: str
    bytes: int
    written: str


Yes = Annotated[bool, typer.Option("--yes", help="Delete without asking.")]


@cache.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the entries of the cache, the oldest first."""
    rows = [asdict(entry) for entry in _entries()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print_table([row | {"bytes": f"{row['bytes']:,}"} for row in rows], f"nothing in {cache_root()}")


@cache.command()
def size(as_json: AsJson = False) -> None:
    """Print the size of the cache and where it is."""
    rows = _entries()
    total = sum(entry.bytes for entry in rows)
    if as_json:
        print(json.dumps({"folder": str(cache_root()), "entries": len(rows), "bytes": total}, indent=1))
        return
    print(f"{cache_root()}: {len(rows)} entries, {total / 1e6:,.1f} MB")


@cache.command()
def clean(
    names: Annotated[list[str] | None, typer.Argument(help="Entries by name, as listed.")] = None,
    older_than: Annotated[
        float | None, typer.Option(help="All entries that were last written this many days ago or earlier.", min=0)
    ] = None,
    yes: Yes = False,
) -> None:
    """Delete entries of the cache; runs that need them train again. Entries in training are kept."""
    rows = {entry.entry: entry for entry in _entries()}
    if wrong := sorted(set(names or ()) - set(rows)):
        raise BenchError(f"no entry {wrong[0]} in {cache_root()}; bench cache list names them")
    if not names and older_than is None:
        raise BenchError("name entries to delete, or give --older-than DAYS (0: all)")
    limit = "" if older_than is None else _utc(max(0.0, time.time() - DAY * older_than))  # a date that exists
    chosen = [name for name, entry in rows.items() if name in (names or ()) or entry.written <= limit]
    if not chosen:
        print("nothing to delete")
        return
    total = sum(rows[name].bytes for name in chosen)
    _confirm(f"delete {len(chosen)} entries of {cache_root()}, {total / 1e6:,.1f} MB", yes)
    for name in chosen:
        _delete(cache_root() / name, "is in training")


@app.command("rm")
def remove(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    yes: Yes = False,
) -> None:
    """Delete run folders. Trained weights stay in the cache. Folders with other files, and runs at work, are kept."""
    for folder in runs:
        if not any((folder / name).is_file() for name in ("run.json", NAME)):
            raise BenchError(f"{folder} is no run folder")
        if others := sorted(f.name for f in folder.iterdir() if f.name not in _OF_A_RUN):
            raise BenchError(f"{folder} has other files, {shown(others[0])} first: move or delete them first")
    _confirm(f"delete {len(runs)} run{'s' if len(runs) > 1 else ''}: {', '.join(map(str, runs))}", yes)
    for folder in runs:
        _delete(folder, "is being run")


def _entries() -> list[Entry]:
    """Return the entries of the cache, the oldest first."""
    root = cache_root()
    found = []
    for folder in root.iterdir() if root.is_dir() else []:
        files = [f for f in folder.iterdir() if f.is_file()] if folder.is_dir() and not folder.is_symlink() else []
        if not any(f.name in ("meta.json", "weights.safetensors") or f.suffix == ".pt" for f in files):
            continue  # not an entry
        state = "trained" if (folder / "meta.json").exists() else "unfinished"
        sizes = [f.stat() for f in files]
        written = _utc(max(s.st_mtime for s in sizes))
        found.append(Entry(folder.name, state, sum(s.st_size for s in sizes), written))
    return sorted(found, key=lambda entry: (entry.written, entry.entry))


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _confirm(question: str, yes: bool) -> None:
    try:
        agreed = yes or typer.confirm(shown(question) + "?")
    except typer.Abort:  # no terminal to ask at, or Ctrl-C
        raise BenchError("nothing was deleted; --yes deletes without asking") from None
    if not agreed:
        raise BenchError("nothing was deleted")


def _delete(folder: Path, why: str) -> None:
    """Delete a folder whose lock is free. Raises BenchError where it cannot be deleted."""
    lock = Lock(folder)
    with writing(folder, "check its permissions"):
        if folder.is_symlink() or is_locked(folder / NAME) or not lock.take():
            print(f"kept {shown(str(folder))}: it {'is a link' if folder.is_symlink() else why}")
            return
        try:
            shutil.rmtree(folder)
        finally:
            lock.release()
    print(f"deleted {shown(str(folder))}")
