"""How the runs of a folder are getting on, as their files tell; imports no torch and disturbs no writer."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.errors import BenchError, one_line, shown
from bench.io import limits
from bench.process import runlog
from bench.process.console import duration
from bench.process.runlog import CERTIFY, NAME, STARTED, is_locked
from bench.records.shards import Shard, shards_in
from bench.smoothing import bounds

_NO_HASH = re.compile(r"-[0-9a-f]{8}(?=$|\.shard-)")  # of a log: that of the command, not of the run
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\S+) ([A-Z]+) (.+)")


def rows(root: Path) -> list[dict[str, Any]]:
    """One dict a run at or below ``root``, a shard, or a run that has no folder yet; numbers are None where not known.

    ``seconds`` are since anything was written. Shards are left out once the whole run is complete.
    """
    # Logs first: one that is gone a moment later has become the log of a folder.
    found = [row for log in sorted(root.glob("*.log")) for row in _begun(log)]
    for folder in [root] if (root / "run.json").exists() else sorted(p for p in root.glob("*") if p.is_dir()):
        whole = [_row(folder, folder.name)] if (folder / "run.json").exists() else []
        found += whole
        if not whole or whole[0]["state"] != "complete":
            found += [_row(path, f"{folder.name}/{path.name}") for path in shards_in(folder).values()]
    return found


def readable(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The same for people: a table, and a line for each run whose last word says more than the table."""
    table = [
        {
            "run": r["run"],
            "state": r["state"],
            "images": "" if r["images"] is None else f"{r['done']}/{r['images']}",
            "right so far": f"{r['accuracy']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" if r["done"] else "",
            "votes/s": "" if r["votes_per_second"] is None else f"{r['votes_per_second']:,.0f}",
            "left": "" if r["eta"] is None else duration(r["eta"]),
            "last sign": f"{duration(r['seconds'])} ago",
        }
        for r in rows
    ]
    said = [r for r in rows if r["note"] and not (r["state"] == "running" and r["images"])]
    return table, [shown(f"{r['run']}: {r['note']}") for r in said]


def _blank(name: str, state: str, note: str, files: list[Path]) -> dict[str, Any]:
    numbers = ("done", "images", "accuracy", "low", "high", "votes_per_second", "eta")
    last = max(map(_written, files))
    return {"run": name, "state": state} | dict.fromkeys(numbers) | {"seconds": time.time() - last, "note": note}


def _written(file: Path) -> float:
    """When it was last written, in seconds since 1970; 0 where it is not there."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _begun(file: Path) -> list[dict[str, Any]]:
    """A run whose identity is not known yet: its data are being loaded or its weights trained. None of another log."""
    try:
        log = _read_log(file)
        return [_blank(_NO_HASH.sub("-...", file.stem), *_state(file, log), [file])] if log.text else []
    except (OSError, BenchError):  # anything may be named so
        return []


def _row(folder: Path, name: str) -> dict[str, Any]:
    file, lines = folder / "run.json", folder / "certificates.jsonl"
    try:
        info = json.loads(limits.contents(file, limits.RUN))
        indices = info["identity"]["indices"]
        images = len(Shard.parse(info["shard"]).part(indices) if "shard" in info else indices)
        log = _read_log(folder / NAME)
        state, note = ("complete", "") if info["status"] == "complete" else _state(folder / NAME, log)
        done, right, votes = _counts(lines, images, log.before)
    # The others are still to be shown.
    except (OSError, ValueError, TypeError, KeyError, RecursionError, BenchError) as e:
        return _blank(name, "unreadable", str(e) if isinstance(e, BenchError) else one_line(e), [file])
    row = _blank(name, state, note, [file, lines, folder / NAME])
    row |= {"done": done, "images": images}
    if done:
        low, high = bounds.interval(right, done)
        row |= {"accuracy": right / done, "low": low, "high": high}
    if log.certifying and done > log.before:
        seconds = max(_written(lines) - log.certifying, 1e-3)
        row["votes_per_second"] = votes / seconds
        if state == "running":
            row["eta"] = (images - done) * seconds / (done - log.before)
    return row


def _counts(file: Path, images: int, before: int) -> tuple[int, int, int]:
    """How many images are done, how many of them are right, and the votes of those after the first ``before``."""
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
    return done, right, votes


@dataclass(frozen=True)
class _Log:
    """What a log says since the last start; ``text`` is empty where it tells of none."""

    level: str = ""  # of the last line
    text: str = ""
    certifying: float | None = None  # since when, in seconds since 1970
    before: int = 0  # images that were done then


def _read_log(file: Path) -> _Log:
    """The end of a log, at most ``runlog.LARGEST``. Raises BenchError or OSError where it cannot be read."""
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
    """Since 1970; None where it is no time."""
    try:
        return datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError):
        return None


def _state(file: Path, log: _Log) -> tuple[str, str]:
    """Of a run that is not complete: running, failed or stopped, and the last line of its log."""
    if is_locked(file):
        return "running", log.text
    return ("failed" if log.level == "ERROR" else "stopped"), log.text
