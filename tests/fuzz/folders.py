"""Fuzz run folders and baselines."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bench.cli import listing
from bench.compare import baseline, check, check_text, pairs, pairs_text
from bench.errors import BenchError
from bench.io.files import digest
from bench.records.flaws import LogParameters
from bench.records.importing import import_log
from bench.records.lines import COMPRESSED
from bench.records.logs import export_log
from bench.records.record import Record, read_run
from bench.records.verify import check_record
from bench.report import tables, text
from bench.smoothing.anytime import Anytime
from bench.smoothing.procedures import describe
from tests.fuzz.cards_and_logs import COHEN
from tests.fuzz.judging import SCRATCH, changed, cut, cuts, dumped, edits, judge, scratch
from tests.helpers.records import made_up

# Run folders -----------------------------------------------------------------------------------------


def _example_runs() -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return name, run.json and certificates of a run with each procedure, an unfinished run and an imported log."""
    anytime = Anytime(100, 1000, 0.001, (0.25, 0.5, 0.75))
    found = []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        out = Path(folder)
        paths = [made_up(out, [990, 1000, 700, 400, 995], wrong=[2], counted=True)]
        paths.append(made_up(out, [0.25, 0.5, None], name="none", procedure=describe(anytime)))
        (out / "log.tsv").write_text("\n".join("\t".join(r) for r in COHEN))
        paths.append(import_log(out / "log.tsv", LogParameters("cohen", "any-data", 0.25, 0.001, 1000), out).path)
        for path in paths:
            info = json.loads((path / "run.json").read_text())
            found.append((path.name, info, [json.loads(x) for x in (path / "certificates.jsonl").open()]))
    name, info, lines = found[0]
    found.append(
        (name, {k: v for k, v in info.items() if k not in ("cost", "metrics")} | {"status": "started"}, lines[:3])
    )
    return found


RUNS = _example_runs()
_BASELINE: dict[str, Any] = {}


def in_lines(values: list[Any]) -> bytes:
    """Write JSON values, one per line."""
    return b"".join(dumped(x) + b"\n" for x in values)


def _use_run(name: str, info: bytes, lines: bytes, packed: bool = False) -> None:
    with scratch() as folder:
        for path, told, rows in (
            (folder / "a" / name, info, lines),
            (folder / "b" / RUNS[0][0], dumped(RUNS[0][1]), None),
        ):
            path.mkdir(parents=True)
            (path / "run.json").write_bytes(told)
            whole = b"".join(dumped(x) + b"\n" for x in RUNS[0][2]) if rows is None else rows
            (path / (COMPRESSED if packed and rows is not None else "certificates.jsonl")).write_bytes(whole)
        run, good = folder / "a" / name, folder / "b" / RUNS[0][0]
        listing.rows("runs", folder / "a")
        records: list[Record] = []

        def report_all() -> None:
            records.extend(tables.load_records(folder / "a")[0])
            if not records:  # as the command does
                raise BenchError("no finished run")
            for form in ("md", "csv", "json", "latex"):
                text.render(tables.build(records, form == "md"), form).encode(errors="backslashreplace")

        def audit() -> None:
            for finding in check_record(run):
                assert finding.check

        def gate() -> None:
            baseline.update(folder / "base.json", good, None)
            check_text.markdown(check.check(folder / "base.json", folder / "a"))
            baseline.update(folder / "other.json", run, True)

        judge("run folder", lambda: read_run(run))
        judge("run folder, report", report_all)
        judge("run folder, verify", audit)
        judge("run folder, compare", lambda: pairs_text.markdown(pairs.compare([run, good])))
        judge("run folder, check", gate)
        judge("run folder, export", lambda: export_log(read_run(run)))


@given(st.sampled_from(RUNS), edits, edits, st.sampled_from(["run", "lines", "lines", "both", "packed"]), cuts)
def run_folders(run: Any, changes: list[Any], others: list[Any], where: str, torn: list[Any]) -> None:
    """Read a run folder with changed fields of run.json or certificates, compressed or not, and a damaged file."""
    name, info, lines = run
    info = changed(info, changes) if where != "lines" else info
    lines = changed(lines, others) if where != "run" else lines
    rows = lines if isinstance(lines, list) else [lines]
    packed = where == "packed"
    text = gzip.compress(in_lines(rows), mtime=0) if packed else in_lines(rows)
    _use_run(name, cut(dumped(info), torn), cut(text, torn[1:]), packed)


@given(st.sampled_from(RUNS), st.binary(max_size=100), st.binary(max_size=100), st.booleans(), st.booleans())
def random_run_folders(run: Any, info: bytes, lines: bytes, valid: bool, packed: bool) -> None:
    """Read random bytes as run.json or certificates.jsonl, or as its compressed copy."""
    _use_run(run[0], dumped(run[1]) if valid else info, lines, packed)


@given(edits, cuts)
def baselines(changes: list[Any], torn: list[Any]) -> None:
    """Read a damaged baseline with changed fields and a hash that fits them."""
    with scratch() as folder:
        path = folder / "runs" / RUNS[0][0]
        path.mkdir(parents=True)
        (path / "run.json").write_bytes(dumped(RUNS[0][1]))
        (path / "certificates.jsonl").write_bytes(in_lines(RUNS[0][2]))
        file = folder / "base.json"
        if not _BASELINE:
            baseline.update(file, folder / "runs", None)
            _BASELINE.update(json.loads(file.read_text()))
        made = changed({k: v for k, v in _BASELINE["runs"][0].items() if k != "sha256"}, changes)
        entry = made | {"sha256": digest(made)} if isinstance(made, dict) else made
        file.write_bytes(cut(dumped(_BASELINE | {"runs": [entry]}), torn))
        judge("baseline", lambda: check_text.markdown(check.check(file, folder / "runs")))
