"""Send a published folder to the hub in one commit, or to a local folder, each run as a whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.io import hub
from bench.io.files import replacing, writing
from bench.publishing import contents, layout
from bench.publishing.contents import TENSORS, Gathered
from bench.publishing.layout import Address
from bench.publishing.reading import check_sizes, download

TOKEN = "HF_TOKEN"
_PARTIAL = ".partial"  # in the folder that is published to; no command looks for runs two levels below a hidden folder


@dataclass(frozen=True)
class Published:
    """What was sent, or would be: each path with its bytes and whether it is new there."""

    place: str
    revision: str | None  # commit that has it; None for a folder, and before it is sent
    files: dict[str, tuple[int, bool]]
    notes: list[str]


def publish(gathered: Gathered, weights: Sequence[Path], to: str, dry_run: bool) -> Published:
    """Publish runs to hub:OWNER/NAME or a folder; what is there already stays.

    A killed command changes nothing on the hub, and in a folder leaves whole runs alone; repeat it.

    Args:
        gathered: The runs.
        weights: Entries of the cache of trained weights.
        to: The address or path.
        dry_run: Compare with what is there, and send nothing.

    Raises:
        BenchError: No token, no right to write, or another run of the same name is there.
    """
    address = layout.address(to)
    if address is None:
        return _to_folder(gathered, weights, Path(to), dry_run)
    if address.revision:
        raise BenchError(f"{to}: publish to hub:{address.repo}; a commit is added to its branch main")
    token = os.environ.get(TOKEN, "").strip()
    if not token and not dry_run:
        raise BenchError(f"{to}: no token; set {TOKEN} to one with write access (huggingface.co/settings/tokens)")
    return _to_hub(gathered, weights, address, token, dry_run)


def _to_hub(gathered: Gathered, weights: Sequence[Path], address: Address, token: str, dry_run: bool) -> Published:
    before, parent = _on_hub(address)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        changed, notes = contents.lay_out(gathered, weights, before, out, address.repo.partition("/")[2])
        files = _sizes(out, changed, before)
        if changed and not dry_run:
            message = f"Publish {len(gathered.records)} runs with certbench"
            parent = hub.upload(address.repo, {path: out / path for path in changed}, message, token, parent)
            there = hub.listing(address.repo, parent).files
            if lost := [path for path, (size, _) in files.items() if there.get(path) != size]:
                raise BenchError(
                    f"{address}: {lost[0]} did not arrive as it was sent; where a .gitignore there excludes it, "
                    "correct that and repeat the command"
                )
    return Published(str(address), None if changed and dry_run else parent, files, notes)


def _on_hub(address: Address) -> tuple[Path | None, str | None]:
    """Download what is published at an address, without weights; None and None where there is no repository."""
    try:
        listed = hub.listing(address.repo)
    except hub.NoRepository:
        return None, None
    wanted = [path for path in listed.files if not path.endswith(TENSORS)]
    check_sizes(address, listed, wanted)
    return download(address, listed, wanted), listed.commit


def _to_folder(gathered: Gathered, weights: Sequence[Path], to: Path, dry_run: bool) -> Published:
    before = to if to.exists() else None
    if before and not to.is_dir():
        raise BenchError(f"--to {to}: a file; give a folder or hub:OWNER/NAME")
    with _staging(to, dry_run) as out:
        changed, notes = contents.lay_out(gathered, weights, before, out, to.resolve().name)
        files = _sizes(out, changed, before)
        if not dry_run:
            for path in sorted(changed, key=lambda p: (not p.startswith(layout.WEIGHTS), p == layout.CARD)):
                _move(out, to, path)
    return Published(str(to), None, files, notes)


@contextmanager
def _staging(to: Path, dry_run: bool) -> Iterator[Path]:
    """Make an empty folder to lay out in, on the disk of ``to`` unless nothing is sent.

    Leftovers of a killed command are deleted.
    """
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    out, existed = to / _PARTIAL / "new", to.exists()
    with writing(to, "choose another place with --to"):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            yield out
        finally:
            shutil.rmtree(out.parent)
            if not existed:
                with suppress(OSError):  # not empty, unless nothing was published
                    to.rmdir()


def _move(out: Path, to: Path, path: str) -> None:
    """Move a file that was laid out to its place; the first of a new run or entry moves its whole folder."""
    if not (out / path).exists():
        return  # moved with its folder
    parts = Path(path).parts
    folder = Path(*parts[:2])
    if len(parts) == 3 and not (to / folder).exists():
        (to / folder.parent).mkdir(exist_ok=True)
        (out / folder).rename(to / folder)
        return
    (to / path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(to / path) as partial:
        shutil.copyfile(out / path, partial)


def _sizes(out: Path, changed: Sequence[str], before: Path | None) -> dict[str, tuple[int, bool]]:
    return {path: ((out / path).stat().st_size, before is None or not (before / path).exists()) for path in changed}
