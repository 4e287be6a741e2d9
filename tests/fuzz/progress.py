"""Fuzz the folders of unfinished runs: logs, shards, certificates so far."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bench.cli import listing
from bench.io.files import digest
from bench.records import merge, status
from bench.records.record import read_run
from bench.records.shards import Shard
from tests.fuzz.folders import RUNS, in_lines
from tests.fuzz.judging import changed, cut, cuts, dumped, edits, judge, scratch

# Logs ------------------------------------------------------------------------------------------------

_WHEN = ["2026-03-01T10:00:00.000+00:00", "2026-03-01T11:30:00", "0001-01-01T00:00:00", "9999-12-31T23:59:59", "2026"]
_WHEN += ["2026-13-41T99:99", "2026-03-01T10:00+99:99", "x"]
_LEVELS = ["INFO", "WARNING", "ERROR", "x"]
_TEXTS = [
    "started: bench run --defense none",
    "started: ",
    "certify none: 2 of 5 images, 1 right",
    "finished: 5 images",
]
_TEXTS += [
    f"certify none: {'9' * 5000} of 5 images, 1 right",
    "certify none: 999 of 5 images, 1 right",
    "\x1b[2J\u202e",
]
_TEXTS += ["train none: 3 of 7, loss 0.1", "x\r2026-03-01T10:00:00 ERROR started: y", ""]
_entries = st.tuples(
    st.sampled_from(_WHEN[:1] * 6 + _WHEN), st.sampled_from(_LEVELS), st.sampled_from(_TEXTS) | st.text(max_size=20)
)
_logs = st.builds(
    lambda first, rest, torn: cut("".join(f"{' '.join(x)}\n" for x in [*first, *rest]).encode(errors="replace"), torn),
    st.sampled_from([[(_WHEN[0], "INFO", _TEXTS[0])]] * 3 + [[]]),
    st.lists(_entries, max_size=6),
    cuts,
)


def _write(folder: Path, info: bytes, lines: bytes, log: bytes | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(info)
    (folder / "certificates.jsonl").write_bytes(lines)
    if log is not None:
        (folder / "log.txt").write_bytes(log)


@given(st.sampled_from(RUNS), edits, edits, st.sampled_from(["run", "lines", "neither"]), cuts, _logs)
def logs_of_runs(run: Any, changes: list[Any], others: list[Any], where: str, torn: list[Any], log: bytes) -> None:
    """Show a running run with any log, and the other runs of its folder."""
    name, info, lines = run
    started = {k: v for k, v in info.items() if k not in ("cost", "metrics")} | {"status": "started"}
    info = changed(started, changes) if where == "run" else started
    rows = changed(lines, others) if where == "lines" else lines
    with scratch() as folder:
        _write(folder / name, cut(dumped(info), torn), in_lines(rows if isinstance(rows, list) else [rows]), log)
        _write(folder / "whole", dumped(RUNS[0][1]), in_lines(RUNS[0][2]))
        (folder / "begun.log").write_bytes(log)
        found: list[status.RunStatus] = []

        def look() -> None:
            found.extend(status.rows(folder))
            json.dumps([[row.as_json() for row in found], status.table(found)])
            assert all(note.isprintable() for note in status.notes(found))
            listing.rows("runs", folder)

        assert judge("status", look), "one run hides the others"
        states = {row.run: row.state for row in found}
        assert states["whole"] == "complete"
        assert states[name] != "unreadable" or where != "neither" or torn


# Shards ----------------------------------------------------------------------------------------------


def _shard(out: Path, shard: str, info: Any, rows: list[Any], torn: list[Any]) -> Path:
    """Write a shard into the folder of the run to which its identity belongs."""
    identity = info.get("identity") if isinstance(info, dict) else None
    run = out / f"digits-x-s0.25-{digest(identity)[:8]}"
    lines = cut(in_lines(rows), torn)
    if isinstance(info, dict) and "certificates_sha256" in info:
        info = info | {"certificates_sha256": hashlib.sha256(lines).hexdigest()}
    _write(run / f"shard-{shard.replace('/', '-of-')}", dumped(info), lines)
    return run


@given(
    st.sampled_from(RUNS[:3]),
    st.just([]) | edits,
    st.just([]) | edits,
    st.sampled_from(["1/2", "1/2", "1/2", "1/2", "1/1", "2/1", "0/0", "01/2", "1/999999"]),
    st.sampled_from(["cpu"] * 8 + [None, "", 3, []]),
    st.booleans(),
    cuts,
)
def shards(
    run: Any, changes: list[Any], others: list[Any], first: str, device: Any, both: bool, torn: list[Any]
) -> None:
    """Merge two shards, one or both changed: the result is a readable run, or nothing is written."""
    _, info, lines = run
    with scratch() as folder:
        for shard, altered in ((first, True), ("2/2", both)):
            kept = Shard(int(shard[-1]), 2).part(lines) if shard.endswith("/2") else lines
            said = info | {"shard": shard, "identity": info["identity"] | {"device": device}}
            rows: Any = kept
            if altered:
                said, rows = changed(said, changes), changed(kept, others)
            path = _shard(folder, shard, said, rows if isinstance(rows, list) else [rows], torn if altered else [])
        whole: list[Path] = []
        if not judge("merge", lambda: whole.extend(merge.merge(folder).whole)):
            assert not list(folder.glob("*/run.json"))
        for path in whole:
            assert read_run(path).whole
        judge("status of shards", lambda: status.table(status.rows(folder)))
