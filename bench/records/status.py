"""The progress of the runs of a folder, read from their files; imports no torch and disturbs no writer."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.errors import BenchError, one_line, shown
from bench.io import limits
from bench.process import runlog
from bench.process.console import duration
from bench.process.runlog import CERTIFY, NAME, STARTED, is_locked
from bench.records.lines import certificates_file
from bench.records.shards import Shard, shards_in
from bench.smoothing import bounds

_NO_HASH = re.compile(r"-[0-9a-f]{8}(?=$|\.shard-)")  # of a log: that of the command, not of the run
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\S+) ([A-Z]+) (.+)")


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run, of a shard, or of a run without a folder yet; numbers are None where not known.

    ``seconds`` since the last update; ``eta`` in seconds; ``note``: the last line of its log.
    """

    run: str
    state: str
    done: int | None
    images: int | None
    accuracy: float | None
    low: float | None
    high: float | None
    votes_per_second: float | None
    eta: float | None
    seconds: float
    note: str

    def as_json(self) -> dict[str, Any]:
        """Return the status as ``--json`` prints it."""
        return asdict(self)


@dataclass(frozen=True)
class _Log:
    """What a log states since the last start; ``text`` is empty where there was none."""

    level: str = ""  # of the last line
    text: str = ""
    certifying: float | None = None  # since when, in seconds since 1970
    before: int = 0  # images that were done then


@dataclass(frozen=True)
class _Counts:
    """Images done, how many of them are right, and the votes of those that this process certified."""

    done: int
    right: int
    votes: int


def rows(root: Path) -> list[RunStatus]:
    """Return the status of each run at or below ``root``; shards are left out once their run is complete."""
    # Logs first: one that disappears in the meantime has become the log of a folder.
    found = [row for log in sorted(root.glob("*.log")) for row in _begun(log)]
    for folder in [root] if (root / "run.json").exists() else sorted(p for p in root.glob("*") if p.is_dir()):
        whole = [_row(folder, folder.name)] if (folder / "run.json").exists() else []
        found += whole
        if not whole or whole[0].state != "complete":
            found += [_row(path, f"{folder.name}/{path.name}") for path in shards_in(folder).values()]
    return found


def table(found: Sequence[RunStatus]) -> list[dict[str, str]]:
    """Return a table's rows as text."""
    return [
        {
            "run": r.run,
            "state": r.state,
            "images": images_done(r),
            "accuracy so far": "" if r.accuracy is None else f"{r.accuracy:.1%} [{r.low:.1%}, {r.high:.1%}]",
            "votes/s": "" if r.votes_per_second is None else f"{r.votes_per_second:,.0f}",
            "left": "" if r.eta is None else duration(r.eta),
            "last update": f"{duration(r.seconds)} ago",
        }
        for r in found
    ]


def images_done(row: RunStatus) -> str:
    """Return how many images are done, as text."""
    return "" if row.images is None else f"{row.done}/{row.images}"


def notes(found: Sequence[RunStatus]) -> list[str]:
    """Return the last log line of each run where it adds to the table."""
    return [shown(f"{r.run}: {r.note}") for r in found if r.note and not (r.state == "running" and r.images)]


def _without_numbers(name: str, state: str, note: str, files: Sequence[Path]) -> RunStatus:
    last = max(map(_written, files))
    return RunStatus(name, state, None, None, None, None, None, None, None, time.time() - last, note)


def _written(file: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 where it does not exist."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _begun(file: Path) -> list[RunStatus]:
    """Return the run of a log without a folder: its data are loaded or its weights trained. None for other logs."""
    try:
        log = _read_log(file)
        name = _NO_HASH.sub("-...", file.stem)
        return [_without_numbers(name, _state(file, log), log.text, [file])] if log.text else []
    except (OSError, BenchError):  # any file may have this name
        return []


def _row(folder: Path, name: str) -> RunStatus:
    file, lines = folder / "run.json", folder / "certificates.jsonl"
    try:
        lines = certificates_file(folder)
        info = json.loads(limits.contents(file, limits.RUN))
        indices = info["identity"]["indices"]
        images = len(Shard.parse(info["shard"]).part(indices) if "shard" in info else indices)
        log = _read_log(folder / NAME)
        complete = info["status"] == "complete"
        state, note = ("complete", "") if complete else (_state(folder / NAME, log), log.text)
        counts = _count(lines, images, log.before)
    # One unreadable run must not hide the others.
    except (OSError, ValueError, TypeError, KeyError, RecursionError, BenchError) as e:
        return _without_numbers(name, "unreadable", str(e) if isinstance(e, BenchError) else one_line(e), [file])
    row = replace(_without_numbers(name, state, note, [file, lines, folder / NAME]), done=counts.done, images=images)
    if counts.done:
        low, high = bounds.interval(counts.right, counts.done)
        row = replace(row, accuracy=counts.right / counts.done, low=low, high=high)
    if log.certifying and counts.done > log.before:
        seconds = max(_written(lines) - log.certifying, 1e-3)
        eta = (images - counts.done) * seconds / (counts.done - log.before) if state == "running" else None
        row = replace(row, votes_per_second=counts.votes / seconds, eta=eta)
    return row


def _count(file: Path, images: int, before: int) -> _Counts:
    """Count lines; votes are those of the images after the first ``before``."""
    done = right = votes = 0
    for line in limits.lines(file, limits.CERTIFICATE) if file.exists() else ():
        if not line.endswith(b"\n"):  # being written
            break
        c = json.loads(line)
        if done == images:
            raise ValueError(f"more certificates than images, {images}")
        spent = 0 if c["votes"] is None else c["votes"]  # an imported log need not say
        if type(spent) is not int or not 0 <= spent < 2**63:
            raise ValueError(f"votes of a certificate are {spent!s:.40}")
        done += 1
        right += c["predicted"] == c["label"]
        votes += spent if done > before else 0
    return _Counts(done, right, votes)


def _read_log(file: Path) -> _Log:
    """Read the end of a log, at most ``runlog.LARGEST``. Raises BenchError or OSError where it cannot be read."""
    found = _Log()
    try:
        end = runlog.tail(file)
    except FileNotFoundError:
        return found
    for line in io.BytesIO(end):
        part = _LINE.fullmatch(line.decode(errors="replace").rstrip("\n"))
        if part and part[3].startswith(STARTED):
            found = _Log(part[2], part[3])
        elif part and found.text:
            found = replace(found, level=part[2], text=part[3])
            count = part[3].startswith(CERTIFY) and re.search(
                r": ([0-9]{1,15}) of [0-9]+ images, [0-9]+ right", part[3]
            )
            if count and found.certifying is None:
                found = replace(found, certifying=_seconds(part[1]), before=int(count[1]))
    return found


def _seconds(when: str) -> float | None:
    """Parse a time as seconds since 1970; None where it is no time."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError):
        return None


def _state(file: Path, log: _Log) -> str:
    """Return the state of a run that is not complete: running, failed or stopped."""
    if is_locked(file):
        return "running"
    return "failed" if log.level == "ERROR" else "stopped"
