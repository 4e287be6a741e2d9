"""Test ``bench status`` and the log of a run, as seen from another terminal."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.process import runlog
from bench.records import status
from bench.smoothing import bounds
from tests.helpers.commands import TINY, Result, defense
from tests.helpers.records import made_up

Bench = Callable[..., Result]
ONE = ("run", "--defense", "none", "--dataset", TINY)


def rows(bench: Bench, out: Path) -> list[dict[str, Any]]:
    result = bench("status", out, "--json")
    assert result.code == 0
    found: list[dict[str, Any]] = json.loads(result.out)
    return found


def stop(monkeypatch: pytest.MonkeyPatch, after: int, error: Callable[[], BaseException]) -> None:
    """End every run with ``error`` after that many images."""
    from bench.records.writer import RunFolder

    real = RunFolder.append

    def append(self: RunFolder, certificate: object) -> None:
        if len(self.done) == after:
            raise error()
        real(self, certificate)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "append", append)


def test_a_run_under_way_stopped_and_finished(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def look() -> BaseException:  # while the run lives: its lock is held
        seen.extend(row.as_json() for row in status.rows(tmp_path))
        return KeyboardInterrupt()

    with monkeypatch.context() as patch:
        stop(patch, 3, look)
        assert bench(*ONE, "--out", tmp_path).code == 130
    (running,) = seen
    assert (running["state"], running["done"], running["images"]) == ("running", 3, 8)
    (file,) = tmp_path.glob("*/certificates.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    right = sum(c["predicted"] == c["label"] for c in lines)
    assert (running["accuracy"], running["low"], running["high"]) == (right / 3, *bounds.interval(right, 3))
    # The pace is recorded votes over elapsed time; both figures agree.
    seconds = 3 * 120 / running["votes_per_second"]
    assert running["eta"] == pytest.approx(seconds * 5 / 3)
    assert 0 < seconds < 60

    (stopped,) = rows(bench, tmp_path)
    assert (stopped["state"], stopped["note"], stopped["eta"]) == ("stopped", "interrupted", None)
    shown = bench("status", tmp_path).out.splitlines()
    assert "3/8" in shown[1] and shown[2] == f"{stopped['run']}: interrupted"

    assert bench(*ONE, "--out", tmp_path).code == 0
    (done,) = rows(bench, tmp_path)
    assert (done["state"], done["done"], done["note"]) == ("complete", 8, "")
    # Five images, those since the second start.
    assert done["votes_per_second"] > 0
    log = (file.parent / "log.txt").read_text()
    assert log.count(" INFO started: ") == 2
    assert "resumed: 3 of 8 images are done" in log
    assert "INFO certify none: 3 of 8 images" in log
    assert "finished: 8 images" in log.splitlines()[-1]


def test_a_failure_is_shown_until_the_run_is_resumed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop(patch, 2, lambda: RuntimeError("the disk is\non fire"))
        with pytest.raises(RuntimeError):
            bench(*ONE, "--out", tmp_path)
    (failed,) = rows(bench, tmp_path)
    assert (failed["state"], failed["done"]) == ("failed", 2)
    assert failed["note"] == "RuntimeError: the disk is"
    (log,) = tmp_path.glob("*/log.txt")
    assert "    Traceback (most recent call last):" in log.read_text()
    assert bench(*ONE, "--out", tmp_path).code == 0
    (resumed,) = rows(bench, tmp_path)
    assert (resumed["state"], resumed["note"]) == ("complete", "")


def test_a_run_that_fails_before_it_has_a_folder(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    good = Path(defense("half_space")).read_text()
    mine.write_text(good + "\n    def build(self) -> None:\n        1 / 0\n")
    out = tmp_path / "runs"
    run = ("run", "--defense", mine, "--dataset", TINY, "--out", out)
    failed = bench(*run)
    assert failed.code == 2
    (row,) = rows(bench, out)
    assert (row["state"], row["images"]) == ("failed", None)
    assert row["run"].startswith("tiny-mine-s0.25-")
    assert "ZeroDivisionError" in row["note"] and f"bench: {row['note']}" in failed.err
    mine.write_text(good)
    assert bench(*run).code == 0
    assert [r["state"] for r in rows(bench, out)] == ["complete"]


def test_training_is_shown_before_there_is_a_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.runs import fitting

    seen: list[dict[str, Any]] = []
    real = fitting.fit

    def fit(plan: Any, base: Any, train: Any, device: Any, progress: Callable[[int, int, float], None]) -> Any:
        def watched(done: int, total: int, loss: float) -> None:
            progress(done, total, loss)
            if not seen:
                seen.extend(row.as_json() for row in status.rows(tmp_path))

        return real(plan, base, train, device, watched)

    monkeypatch.setattr(fitting, "fit", fit)
    run = ("run", "--defense", "lora", "--dataset", TINY, "--seed", 78, "--out", tmp_path)
    assert bench(*run).code == 0
    (row,) = seen
    assert row["state"] == "running" and row["note"].startswith("train lora at sigma 0.25: ")
    (folder,) = tmp_path.iterdir()  # the log has moved into the run's folder
    log = (folder / "log.txt").read_text()
    versions, started = log.splitlines()[:2]
    assert "torch" in versions and "commit" in versions
    assert bench(*shlex.split(started.partition("started: bench ")[2])).err.count("already complete") == 1
    trained = json.loads((folder / "run.json").read_text())["identity"]["defense"]["weights"]
    assert f"INFO weights {trained[:8]}, which took" in log
    assert list(tmp_path.iterdir()) == [folder]


def test_a_killed_process_releases_its_log(tmp_path: Path) -> None:
    file = tmp_path / "tiny-none-s0.25-01234567.log"
    code = (
        "import sys, time; from pathlib import Path; from bench.process.runlog import RunLog, log\n"
        "log.addHandler(RunLog(Path(sys.argv[1]))); log.info('started: bench run')\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    (row,) = (r.as_json() for r in status.rows(tmp_path))
    assert row["state"] == "running"
    with pytest.raises(BenchError, match="another process"):
        runlog.RunLog(file)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (row,) = (r.as_json() for r in status.rows(tmp_path))
    assert row["state"] == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_log_that_cannot_be_written_costs_no_certificate(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runlog.RunLog.move_into

    def move_into(self: runlog.RunLog, folder: Path) -> None:
        real(self, folder)
        self._stream.close()
        self._stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

    monkeypatch.setattr(runlog.RunLog, "move_into", move_into)
    ran = bench(*ONE, "--out", tmp_path)
    assert ran.code == 0
    assert ran.err.count("is incomplete: No space left on device") == 1
    (row,) = rows(bench, tmp_path)
    assert (row["state"], row["done"]) == ("complete", 8)


def test_warnings_are_logged_and_still_shown(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    text = Path(defense("half_space")).read_text()
    mine.write_text(
        text + "\n    def build(self) -> None:\n        import warnings\n        warnings.warn('far\\noff')\n"
    )
    with pytest.warns(UserWarning, match="far"):
        assert bench("run", "--defense", mine, "--dataset", TINY, "--out", tmp_path / "runs").code == 0
    (log,) = (tmp_path / "runs").glob("*/log.txt")
    assert "WARNING far off" in log.read_text()


def test_status_of_nothing_and_of_damaged_folders(bench: Bench, tmp_path: Path) -> None:
    assert f"no runs in {tmp_path}" in bench("status", tmp_path).out
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "run.json").write_text("{")
    (tmp_path / "foreign.log").write_text("not ours\n")
    assert bench(*ONE, "--out", tmp_path, "--shard", "2/3").code == 0
    damaged, shard = rows(bench, tmp_path)
    assert damaged["state"] == "unreadable" and "JSONDecodeError" in damaged["note"]
    assert shard["run"].endswith("/shard-2-of-3")
    assert (shard["state"], shard["done"], shard["images"]) == ("complete", 3, 3)


START = "2026-03-01T10:00:00.000+00:00 INFO started: bench run\n"


def unfinished(out: Path, log: bytes = b"", **changes: Any) -> Path:
    """Make a run with two images done."""
    run = made_up(out, [0.1, 0.2])
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"status": "started"} | changes))
    (run / "log.txt").write_bytes(log)
    return run


def test_only_the_end_of_a_huge_log_is_read(bench: Bench, tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    for file in (run / "log.txt", tmp_path / "begun.log", tmp_path / "foreign.log"):
        os.truncate(file, 0) if file.exists() else file.touch()
        os.truncate(file, 2**40)
        if file.name != "foreign.log":
            with file.open("a") as f:
                f.write(f"\n{START}2026-03-01T10:00:01.000+00:00 ERROR no room\n")
    assert [(r["state"], r["note"]) for r in rows(bench, tmp_path)] == [("failed", "no room")] * 2


def test_an_imported_log_is_a_run_too(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.2\t1\t0:00:01\n")
    stated = ("--dataset", "x", "--sigma", ".25", "--alpha", ".001", "--n", "1000")
    bench("import", tmp_path / "log.tsv", *stated, "--out", tmp_path / "runs")
    (row,) = rows(bench, tmp_path / "runs")
    assert (row["state"], row["done"], row["accuracy"]) == ("complete", 1, 1.0)


def test_logs_that_bench_did_not_write(bench: Bench, tmp_path: Path) -> None:
    certify = "certify lora: 1 of 2 images, 1 right"
    lines = [
        "2026-99-99T10:00 INFO " + certify,
        f"x INFO {certify}",
        f"2026-03-01T10:00 INFO {certify.replace('1', '9' * 5000)}",
    ]
    run = unfinished(tmp_path, (START + "\n".join([*lines, "2026-03-01T10:00 INFO \x1b[2J\n"])).encode())
    shown = bench("status", tmp_path)
    assert shown.code == 0 and "\x1b" not in shown.out and "x1b[2J" in shown.out
    (row,) = rows(bench, tmp_path)
    assert (row["state"], row["done"], row["votes_per_second"]) == ("stopped", 2, None)
    (run / "log.txt").unlink()
    os.mkfifo(run / "log.txt")  # opening it would block for ever
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "folder.log").mkdir()
    (row,) = rows(bench, tmp_path)
    assert row["state"] == "unreadable" and "log.txt: not a regular file" in row["note"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", "[" * 9000, "RecursionError"),
        ("certificates.jsonl", "[" * 9000 + "\n", "RecursionError"),
        ("certificates.jsonl", '{"label": 1, "predicted": 1, "votes": "x"}\n', "votes of a certificate are x"),
        ("certificates.jsonl", '{"label": 1, "predicted": 1, "votes": 1}\n' * 3, "more certificates than images, 2"),
        ("certificates.jsonl", "x" * 10**6, "a line of more than 10,000 bytes"),
    ],
)
def test_one_damaged_run_does_not_hide_the_others(
    bench: Bench, tmp_path: Path, name: str, text: str, words: str
) -> None:
    (unfinished(tmp_path, START.encode()) / name).write_text(text)
    made_up(tmp_path, [0.1], name="none")
    damaged, good = rows(bench, tmp_path)
    assert damaged["state"] == "unreadable" and words in damaged["note"]
    assert good["state"] == "complete"
