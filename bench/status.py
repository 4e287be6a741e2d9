"""How the runs of a folder are getting on, as their files tell; imports no torch and disturbs no writer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import bounds
from bench.console import duration
from bench.errors import BenchError, one_line
from bench.runlog import CERTIFY, NAME, STARTED, held
from bench.shards import Shard, shards_in

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\S+) ([A-Z]+) (.*)")


def rows(root: Path) -> list[dict[str, Any]]:
    """One dict a run at or below ``root``, a shard, or a run that has no folder yet; numbers are None where not known.

    ``seconds`` are since anything was written. Shards are left out once the whole run is complete.
    """
    # Logs first: one that is gone a moment later has become the log of a folder.
    found = [_begun(log) for log in sorted(root.glob("*.log")) if _log_lines(log)]
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
    return table, [
        f"{r['run']}: {r['note']}" for r in rows if r["note"] and not (r["state"] == "running" and r["images"])
    ]


def _blank(name: str, state: str, note: str, files: list[Path]) -> dict[str, Any]:
    numbers = ("done", "images", "accuracy", "low", "high", "votes_per_second", "eta")
    last = max(map(_written, files))
    return {"run": name, "state": state} | dict.fromkeys(numbers) | {"seconds": time.time() - last, "note": note}


def _written(file: Path) -> float:
    """When it was last written, in seconds since 1970; 0 where it is not there."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _begun(log: Path) -> dict[str, Any]:
    """A run whose identity is not known yet: its data are being loaded or its weights trained."""
    state, note = _state(log)
    return _blank(log.stem, state, note, [log])


def _row(folder: Path, name: str) -> dict[str, Any]:
    file, lines, log = folder / "run.json", folder / "certificates.jsonl", folder / NAME
    try:
        info = json.loads(file.read_text())
        indices = info["identity"]["indices"]
        images = len(Shard.parse(info["shard"]).part(indices) if "shard" in info else indices)
        state, note = ("complete", "") if info["status"] == "complete" else _state(log)
        done = [json.loads(line) for line in _whole_lines(lines)]
        right = sum(c["predicted"] == c["label"] for c in done)
        votes = [c["votes"] for c in done]
    except (OSError, ValueError, TypeError, KeyError, BenchError) as e:  # the others are still to be shown
        return _blank(name, "unreadable", one_line(e), [file])
    row = _blank(name, state, note, [file, lines, log])
    row |= {"done": len(done), "images": images}
    if done:
        low, high = bounds.interval(right, len(done))
        row |= {"accuracy": right / len(done), "low": low, "high": high}
    began, before = _certifying_since(log)
    if began and len(done) > before:
        seconds = max(lines.stat().st_mtime - began, 1e-3)
        row["votes_per_second"] = sum(votes[before:]) / seconds
        if state == "running":
            row["eta"] = (images - len(done)) * seconds / (len(done) - before)
    return row


def _whole_lines(file: Path) -> Iterator[str]:
    if file.exists():
        with file.open() as f:
            yield from (line for line in f if line.endswith("\n"))


def _log_lines(log: Path) -> list[tuple[str, str, str]]:
    """Time, level and text of the lines since the last start; none where it is no run's log."""
    found: list[tuple[str, str, str]] = []
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        part = _LINE.fullmatch(line)
        if part and part[3].startswith(STARTED):
            found = [(part[1], part[2], part[3])]
        elif part and found:
            found.append((part[1], part[2], part[3]))
    return found


def _state(log: Path) -> tuple[str, str]:
    """Of a run that is not complete: running, failed or stopped, and the last line of its log."""
    _, level, text = (_log_lines(log) or [("", "", "")])[-1]
    if held(log):
        return "running", text
    return ("failed" if level == "ERROR" else "stopped"), text


def _certifying_since(log: Path) -> tuple[float | None, int]:
    """When the last start came to certify (seconds since 1970), and how many images were done before."""
    for when, _, text in _log_lines(log):
        count = re.search(r": (\d+) of \d+ images, \d+ right", text)
        if text.startswith(CERTIFY) and count:
            return datetime.fromisoformat(when).timestamp(), int(count[1])
    return None, 0
