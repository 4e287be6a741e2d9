"""bench cache and bench rm delete what is named, and nothing that is in use or not theirs."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from bench.process.locks import Lock
from tests.helpers.commands import TESTS, Bench

RECORDS = TESTS.parent / "reports" / "digits-quick" / "runs"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a trained entry of 40 days, an unfinished one of today, and a folder that is no entry."""
    root = tmp_path / "cache"
    monkeypatch.setenv("CERTBENCH_CACHE", str(root))
    for name, files in {
        "old": {"meta.json": "{}", "weights.safetensors": "x" * 1000},
        "new": {"checkpoint.pt": "y" * 500},
        "mine": {"notes.txt": "z"},
    }.items():
        (root / name).mkdir(parents=True)
        for entry, text in files.items():
            (root / name / entry).write_text(text)
    then = time.time() - 40 * 86_400
    for file in (root / "old").iterdir():
        os.utime(file, (then, then))
    return root


def test_entries_and_their_size_are_listed(bench: Bench, cache: Path) -> None:
    rows = json.loads(bench("cache", "list", "--json").out)
    assert [(row["entry"], row["state"], row["bytes"]) for row in rows] == [
        ("old", "trained", 1002),
        ("new", "unfinished", 500),
    ]
    assert json.loads(bench("cache", "size", "--json").out) == {"folder": str(cache), "entries": 2, "bytes": 1502}
    assert "2 entries, 0.0 MB" in bench("cache", "size").out
    table = bench("cache", "list").out
    assert "old" in table and "1,002" in table and "mine" not in table


def test_entries_are_deleted_by_name_or_age(bench: Bench, cache: Path) -> None:
    result = bench("cache", "clean", "--older-than", "30", "--yes")
    assert result.code == 0 and f"deleted {cache / 'old'}" in result.out
    assert {f.name for f in cache.iterdir()} == {"new", "mine"}
    assert "nothing to delete" in bench("cache", "clean", "--older-than", "30", "--yes").out
    assert bench("cache", "clean", "new", "--yes").code == 0
    assert {f.name for f in cache.iterdir()} == {"mine"}
    assert bench("cache", "list").out == f"nothing in {cache}\n"


@pytest.mark.parametrize("days", ["1e6", "1e30", "inf"])
def test_nothing_is_older_than_any_number_of_days(bench: Bench, cache: Path, days: str) -> None:
    result = bench("cache", "clean", "--older-than", days, "--yes")
    assert result.code == 0 and result.out == "nothing to delete\n" and len(list(cache.iterdir())) == 3


def test_an_entry_in_training_is_kept(bench: Bench, cache: Path) -> None:
    lock = Lock(cache / "new")
    assert lock.take()
    try:
        result = bench("cache", "clean", "--older-than", "0", "--yes")
    finally:
        lock.release()
    assert "new: it is in training" in result.out and (cache / "new" / "checkpoint.pt").exists()
    assert not (cache / "old").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["none-such", "--yes"], "no entry none-such"), (["mine", "--yes"], "no entry mine"), ([], "--older-than DAYS")],
)
def test_nothing_is_deleted_by_mistake(bench: Bench, cache: Path, words: list[str], message: str) -> None:
    result = bench("cache", "clean", *words)
    assert result.code == 2 and message in result.err and len(list(cache.iterdir())) == 3


def test_without_an_answer_nothing_is_deleted(bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda question: False)
    result = bench("cache", "clean", "old")
    assert result.code == 2 and "nothing was deleted" in result.err and (cache / "old").exists()


def test_without_a_terminal_nothing_is_deleted(
    bench: Bench, cache: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for words in (("cache", "clean", "old"), ("rm", run)):
        result = bench(*words)
        assert result.code == 2 and result.err == "bench: nothing was deleted; --yes deletes without asking\n"
    assert (cache / "old").exists() and run.exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (found,) = RECORDS.glob("digits-lora-*")
    return shutil.copytree(found, tmp_path / "runs" / found.name)


def test_a_run_is_deleted(bench: Bench, run: Path) -> None:
    result = bench("rm", run, "--yes")
    assert result.code == 0 and result.out == f"deleted {run}\n" and not run.exists() and run.parent.exists()


def test_a_run_at_work_is_kept(bench: Bench, run: Path) -> None:
    lock = Lock(run)
    assert lock.take()
    try:
        assert "it is being run" in bench("rm", run, "--yes").out
    finally:
        lock.release()
    assert (run / "run.json").exists()


def test_folders_with_other_files_and_other_folders_are_kept(bench: Bench, run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    result = bench("rm", run, "--yes")
    assert result.code == 2 and "notes.txt" in result.err and (run / "run.json").exists()
    result = bench("rm", run.parent, "--yes")
    assert result.code == 2 and "is no run folder" in result.err and run.exists()


def test_a_link_is_not_followed(bench: Bench, run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run)
    assert "it is a link" in bench("rm", link, "--yes").out and (run / "run.json").exists()
