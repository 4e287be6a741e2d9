"""Baselines of ``bench check``: the results of finished runs, in one file that diffs well.

Keys are sorted, and an image is one short line (index, certified radius or null where it is not right, n,
top_count). An entry is matched to a run by its method and all that makes two runs comparable; the hash at its end
shows edits by hand and half-merged conflicts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.compare.entries import Entry, entry_of
from bench.errors import BenchError, one_line
from bench.io import files, limits
from bench.io.files import digest
from bench.records import verify
from bench.records.record import Record, find_runs, read_run

VERSION = 1
LARGEST = 256 * limits.MB
ANY_BASE, SAME_BASE = "trained anew", "same weights"  # values of the file's field "base"


@dataclass(frozen=True)
class Baseline:
    """A baseline file. ``any_base``: its base may be retrained, so that other weights are accepted."""

    any_base: bool
    entries: list[Entry]

    @property
    def base(self) -> str:
        """The value of the file's field."""
        return ANY_BASE if self.any_base else SAME_BASE


@dataclass(frozen=True)
class Update:
    """A baseline before (None: there was none) and after it was written."""

    old: Baseline | None
    new: Baseline


def read(file: Path) -> Baseline:
    """Read the baseline at ``file``. Raises BenchError where there is none, it is newer, or was edited."""
    try:
        found = json.loads(limits.contents(file, LARGEST))
    except FileNotFoundError:
        raise BenchError(f"no baseline at {file}; create it with bench check --baseline {file} RUNS --update") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None
    version = found.get("certbench_baseline") if isinstance(found, dict) else None
    if type(version) is not int:
        raise BenchError(f"{file} is not a baseline of bench check; name another file with --baseline")
    if version > VERSION:
        raise BenchError(f"{file}: version {version} is newer than this bench reads ({VERSION}); upgrade certbench")
    if found.get("base") not in (ANY_BASE, SAME_BASE) or not isinstance(found.get("runs"), list):
        raise BenchError(f"{file}: no base or runs in it; delete it, and create it again with --update")
    try:
        return Baseline(found["base"] == ANY_BASE, [_entry(file, one) for one in found["runs"]])
    except RecursionError as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None


def _entry(file: Path, stored: object) -> Entry:
    fields = {k: v for k, v in stored.items() if k != "sha256"} if isinstance(stored, dict) else {}
    if not isinstance(stored, dict) or digest(fields) != stored.get("sha256"):
        name = stored.get("name") if isinstance(stored, dict) else stored
        raise BenchError(
            f"{file}: the entry {str(name)!r:.80} was edited by hand; restore it, or delete the file and --update"
        )
    try:
        return Entry.of(fields)
    except BenchError as e:
        raise BenchError(
            f"{file}: not as bench check writes it: {e}; delete it, and create it again with --update"
        ) from None


def write(file: Path, baseline: Baseline) -> None:
    """Write a baseline atomically, innermost lists on one line each."""
    entries = [e.as_json() | {"sha256": e.sha256} for e in sorted(baseline.entries, key=lambda e: (e.name, e.sha256))]
    content = {"certbench_baseline": VERSION, "base": baseline.base, "runs": entries}
    text = json.dumps(content, indent=1, sort_keys=True)
    # A raw newline is never inside a JSON string, so only white space between values is removed.
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]).replace("[ ", "[")[:-2] + "]", text)
    with files.writing(file, "choose another file with --baseline"):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, text + "\n")


def trusted(path: Path) -> Record:
    """Read the finished run at ``path`` whose numbers follow from its counts. Raises BenchError for any other."""
    record = read_run(path)
    if not record.complete:
        raise BenchError(f"{path}: unfinished; repeat its bench run command to finish it")
    if record.imported:
        raise BenchError(f"{path}: imported, with neither counts nor cost; a baseline needs runs made here")
    if wrong := [finding.problem for finding in verify.check_record(path) if finding.problem]:
        raise BenchError(f"{path}: {wrong[0]}; for details: bench verify {path}")
    return record


def update(file: Path, runs: Path, any_base: bool | None) -> Update:
    """Write all finished runs in ``runs`` as the baseline; ``any_base`` None: as the old one has it.

    Raises BenchError where a run is unfinished, does not hold, or is there twice.
    """
    old = read(file) if file.exists() else None
    loose = (old is not None and old.any_base) if any_base is None else any_base
    entries = _entries(runs, find_runs(runs), loose)
    if not entries:
        raise BenchError(f"no finished run in {runs}; create one with bench run")
    write(file, Baseline(loose, entries))
    return Update(old, read(file))


def _entries(runs: Path, paths: Sequence[Path], any_base: bool) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for path in paths:
        one = entry_of(trusted(path))
        if entries.setdefault(digest(one.key(any_base)), one) is not one:
            raise BenchError(f"{path}: {one.name} is in {runs} twice; give bench run a new --out, or move one away")
    return list(entries.values())
