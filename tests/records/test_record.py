"""Run folders: appended, resumed after a crash, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.records import metrics
from bench.records.record import find_runs, read_run
from bench.records.schema import SCHEMA, Cost
from bench.records.writer import RunFolder
from bench.smoothing.votes import Certificate
from tests.helpers.records import begun, costs

INFO = begun(3)


def certificate(index: int) -> Certificate:
    return Certificate(1, 0.1, 10, 100, 90, 0, 10, 0.8, 110, index=index, label=1, seconds=0.5)


def open_run(out: Path) -> RunFolder:
    return RunFolder(out, "d-none-s0.25", INFO)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    for i in range(3):
        run.append(certificate(i))
    run.finish(Cost.of(costs(330)), metrics.summarise(run.done, [0.0]))
    run.close()
    record = read_run(run.path)
    assert record.complete
    assert record.identity == INFO.identity
    assert list(record.certificates) == [certificate(i) for i in range(3)]
    assert find_runs(tmp_path) == [run.path]
    assert find_runs(run.path) == [run.path]


@pytest.mark.parametrize("torn", ['{"index": 2, "lab', '{"index": 2}', ""])
def test_a_torn_last_line_is_dropped_and_redone(tmp_path: Path, torn: str) -> None:
    run = open_run(tmp_path)
    run.append(certificate(0))
    run.close()
    with (run.path / "certificates.jsonl").open("a") as f:
        f.write(torn)
    again = open_run(tmp_path)
    assert [c.index for c in again.done] == [0]
    again.append(certificate(2))
    again.close()
    assert [c.index for c in read_run(run.path).certificates] == [0, 2]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(BenchError, match="another process"):
        open_run(tmp_path)
    run.close()
    open_run(tmp_path).close()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.close()
    file = run.path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": SCHEMA + 1}))
    before = file.read_bytes()
    for attempt in (lambda: read_run(run.path), lambda: open_run(tmp_path)):
        with pytest.raises(BenchError, match="newer"):
            attempt()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("run.json", "{", "unreadable"),
        ("run.json", "[]", "no schema version"),
        ("run.json", '{"schema": 1}', "status"),
        ("certificates.jsonl", "not json\n", "not a certificate"),
        ("certificates.jsonl", '{"index": 1, "unknown": 2}\n', "not a certificate"),
    ],
)
def test_corrupt_files_are_named(tmp_path: Path, file: str, text: str, words: str) -> None:
    run = open_run(tmp_path)
    run.append(certificate(0))
    run.close()
    (run.path / file).write_text(text)
    with pytest.raises(BenchError, match=words) as error:
        read_run(run.path)
    assert file in str(error.value)


def test_an_image_certified_twice_is_an_error(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.append(certificate(0))
    run.append(certificate(0))
    run.close()
    with pytest.raises(BenchError, match="twice"):
        read_run(run.path)


def test_an_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="--out"):
        open_run(tmp_path / "file")
