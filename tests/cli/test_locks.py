"""A message names the holder of a lock, and how to remove one that outlives its process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.process.locks import Lock
from bench.process.runlog import RunLog, log, recording, signature
from bench.records.writer import RunFolder
from bench.training.weights import CacheEntry
from tests.helpers.commands import TINY, Result
from tests.helpers.records import begun

Bench = Callable[..., Result]
ME = f"process {os.getpid()} on {socket.gethostname()} since 20"
DEAD = f"4242\nnode-a.cluster\n{'3' * 40}\n"


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as Lustre without -o flock."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


class SilentReporter:
    def say(self, text: str) -> None:
        pass


def opened(out: Path) -> RunFolder:
    return RunFolder(out, "digits-lora-s0.25", begun(3))


def waiting(entry: CacheEntry) -> str:
    """The line by which a second process says that it waits for the entry; the lock file is removed then."""
    said: list[str] = []

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            (entry.folder / ".lock").unlink()

    handler = Line(logging.WARNING)
    logging.getLogger("bench").addHandler(handler)
    try:
        with entry.lock():
            pass
    finally:
        logging.getLogger("bench").removeHandler(handler)
    (line,) = said
    return line


def test_the_holder_of_a_run_is_named(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with recording(run.path / "log.txt", SilentReporter()):  # type: ignore[arg-type]
        log.info("on this and that, %s", signature())
    with pytest.raises(BenchError) as refused:
        opened(tmp_path)
    assert f"{run.path} is being written by another process ({ME}" in str(refused.value)
    assert "remove" not in str(refused.value)  # a lock of flock ends with its process
    run.close()
    opened(tmp_path).close()


def test_the_holder_of_an_entry_is_named(tmp_path: Path) -> None:
    entry = CacheEntry("shared", {"id": str(tmp_path)})
    with entry.lock():
        lock = Lock(entry.folder)
        assert not lock.take()
        assert lock.held_by().startswith(f" ({ME}")
    assert not list(entry.folder.glob(".lock-*"))
    assert lock.take()
    lock.release()


def test_the_writer_of_a_log_is_named(tmp_path: Path) -> None:
    with recording(tmp_path / "run.log", SilentReporter()):  # type: ignore[arg-type]
        log.info("on this and that, %s", signature())
        with pytest.raises(BenchError) as refused:
            RunLog(tmp_path / "run.log")
        assert f"is being written by another process ({ME}" in str(refused.value)
    assert [f.name for f in tmp_path.iterdir()] == ["run.log"]


@pytest.mark.usefixtures("no_flock")
def test_a_lock_that_outlives_its_process_is_said_at_once_and_how_to_clear_it(tmp_path: Path) -> None:
    entry = CacheEntry("shared", {"id": str(tmp_path)})
    entry.folder.mkdir(parents=True)
    (entry.folder / ".lock").write_text(DEAD)
    said = waiting(entry)
    assert said.startswith(
        f"another process is training {entry.folder.name}; waiting for it (process 4242 on node-a.clu"
    )
    assert f"if that process no longer runs: rm {entry.folder / '.lock'}" in said


@pytest.mark.usefixtures("no_flock")
def test_a_lock_file_of_a_process_that_had_flock_is_said_too(tmp_path: Path) -> None:
    """It is empty, and stays when its process has ended."""
    entry = CacheEntry("left", {"id": str(tmp_path)})
    entry.folder.mkdir(parents=True)
    (entry.folder / ".lock").touch()
    assert f"if that process no longer runs: rm {entry.folder / '.lock'}" in waiting(entry)


@pytest.mark.usefixtures("no_flock")
def test_the_same_of_a_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))  # that of other tests has files of flock
    args = ("run", "--defense", "none", "--dataset", TINY, "--examples", 1, "--out", tmp_path / "runs")
    assert bench(*args).code == 0
    (run,) = tmp_path.glob("runs/*/run.json")
    assert not (run.parent / ".lock").exists()
    (run.parent / ".lock").write_text(DEAD)
    refused = bench(*args)
    assert refused.code == 2
    last = refused.err.splitlines()[-1]
    assert "process 4242 on node-a.cluster" in last and f"rm {run.parent / '.lock'}" in last
    (run.parent / ".lock").unlink()
    assert bench(*args).code == 0


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_lock_holds_and_is_given_back(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with pytest.raises(BenchError, match="is being written by another process"):
        opened(tmp_path)
    run.close()
    opened(tmp_path).close()


def test_a_file_system_without_any_lock_is_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = bench("run", "--defense", "none", "--dataset", TINY, "--examples", 1, "--out", tmp_path)
    assert result.code == 2 and "Traceback" not in result.err
    assert "No locks available" in result.err.splitlines()[-1]
