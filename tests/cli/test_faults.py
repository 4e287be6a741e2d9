"""What goes wrong on a long run, end to end: disks, caches, two processes at once, memory, and defenses at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.io.files import cache_root
from tests.helpers.apart import NO_MOUNTS, impatient, on_a_read_only_disk, on_a_small_disk, run, start, with_small_files
from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
FAULTY = defense("faulty")
LORA = ["run", "--defense", "lora", "--dataset", TINY]
RUN = ["run", "--defense", "none", "--dataset", TINY, "--examples", "60"]


def certificates(out: Path) -> list[dict[str, object]]:
    """All of one run folder, without their timing, by image."""
    (file,) = out.glob("*/certificates.jsonl")
    rows = [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda r: str(r["index"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of ``RUN``, undisturbed; and the base it needs is in the cache."""
    from bench.cli import main

    out = tmp_path_factory.mktemp("whole")
    with pytest.raises(SystemExit) as stop:
        main([*RUN, "--out", str(out)])
    assert not stop.value.code
    return out


# Disks ------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """A real small disk, which grows by a page at a time: every write of a run meets its end once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    pages = [*range(4, 128, 4), 256, 512]
    command, log = [*RUN, "--out", str(disk / "runs")], tmp_path / "log"
    args = (command, disk / "runs", disk, pages, tmp_path / "kept")
    process = start(on_a_small_disk, *args, cache=cache_root(), log=log)
    process.join()
    if process.exitcode == NO_MOUNTS:
        pytest.skip("this system allows no mounts")
    said = log.read_text()
    assert process.exitcode == 0, said
    errors = [line for line in said.splitlines() if line.startswith("bench: ")]
    # A log that has gaps ends no run; whatever does is one line.
    errors = [e for e in errors if not ("log.txt has gaps: No space left" in e and str(disk) in e)]
    assert said.count("-- ") == len(errors) + 2 >= 5  # the last size, and that it fits
    assert all("cannot write" in e and str(disk) in e and "No space left" in e for e in errors)
    assert any("certificates.jsonl" in e and "all certificates so far are kept: free space there" in e for e in errors)
    assert certificates(tmp_path / "kept") == certificates(whole)


def test_a_full_cache_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """The same of checkpoints and weights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command, log = [*RUN, "--out", str(tmp_path / "runs")], tmp_path / "log"
    args = (command, tmp_path / "runs", disk, [4, 64, 192, 4096], tmp_path / "kept")
    process = start(on_a_small_disk, *args, cache=disk, log=log)
    process.join()
    if process.exitcode == NO_MOUNTS:
        pytest.skip("this system allows no mounts")
    said = log.read_text()
    assert process.exitcode == 0, said
    errors = [line for line in said.splitlines() if line.startswith("bench: ")]
    assert any("checkpoint.pt: No space left" in e for e in errors), said
    assert all("cannot write" in e and str(disk) in e and "CERTBENCH_CACHE" in e for e in errors)
    assert certificates(tmp_path / "kept") == certificates(whole)


def test_a_write_that_ends_within_a_line_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """Where no disk can be mounted: files of at most 5,000 bytes, so that a certificate is written in part."""
    command, log = [*RUN, "--out", str(tmp_path / "runs")], tmp_path / "log"
    process = start(with_small_files, command, tmp_path / "runs", 5000, cache=cache_root(), log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert "certificates.jsonl: File too large; all certificates so far are kept" in log.read_text()
    assert certificates(tmp_path / "runs") == certificates(whole)


def test_a_read_only_disk_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    command = [*RUN, "--out", str(disk / "runs")]
    process = start(on_a_read_only_disk, command, disk, cache=tmp_path / "cache", log=log)
    process.join()
    if process.exitcode == NO_MOUNTS:
        pytest.skip("this system allows no mounts")
    assert process.exitcode == 2
    (said,) = log.read_text().splitlines()
    assert said == f"bench: cannot write {disk}/runs: Read-only file system; choose another folder with --out"
    assert not (tmp_path / "cache").exists()


def test_a_file_in_place_of_the_output_is_refused_before_anything_is_trained(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("kept")
    result = bench(*RUN, "--out", tmp_path / "file")
    assert result.code == 2
    (said,) = result.err.splitlines()
    assert "cannot write" in said and "--out" in said
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "cache").exists()


# The cache --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and the run that filled it."""
    from bench.cli import main

    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CERTBENCH_CACHE", str(place / "cache"))
        with pytest.raises(SystemExit) as stop:
            main([*LORA, "--out", str(place / "runs")])
    assert not stop.value.code
    return place


@pytest.mark.parametrize("damage", ["weights.safetensors", "meta.json", "no weights", "another's"])
def test_a_corrupt_cache_entry_is_said_and_made_anew(
    bench: Bench, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    args = (*LORA, "--out", tmp_path / "runs")
    (folder,) = (tmp_path / "cache").glob("tiny-lora*")
    (base,) = (tmp_path / "cache").glob("tiny-base*")
    weights = folder / "weights.safetensors"
    before = weights.read_bytes()
    if damage == "no weights":
        weights.unlink()
    elif damage == "another's":
        shutil.copytree(base, folder, dirs_exist_ok=True)
    else:
        data = bytearray((folder / damage).read_bytes())
        data[-9] ^= 1  # one bit
        (folder / damage).write_bytes(data)
    result = bench(*args)
    assert result.code == 0
    (said,) = [line for line in result.err.splitlines() if line.startswith("bench: ")]
    assert f"corrupt cache entry {folder}" in said and "made anew" in said
    assert weights.read_bytes() == before
    assert "already complete" in result.err  # the same weights, so the same run
    assert "corrupt cache" not in bench(*args).err


# Two processes ----------------------------------------------------------------------------------------


def test_started_twice_at_once_one_writes(tmp_path: Path) -> None:
    """From an empty cache: one trains and certifies, the other is told so."""
    command = ["run", "--defense", "full", "--dataset", TINY, "--examples", "60", "--n", "1000"]
    cache, logs = tmp_path / "cache", [tmp_path / "log-0", tmp_path / "log-1"]
    both = [start(run, [[*command, "--out", str(tmp_path / "runs")]], cache=cache, log=log) for log in logs]
    for process in both:
        process.join()
    said = [log.read_text() for log in logs]
    assert sorted(p.exitcode or 0 for p in both) == [0, 2], said
    (refused,) = [log for log, p in zip(said, both, strict=True) if p.exitcode]
    last = refused.splitlines()[-1]
    assert last.startswith("bench: ") and "is being written by another process" in last
    (info,) = (tmp_path / "runs").glob("*/run.json")
    indices = json.loads(info.read_text())["identity"]["indices"]
    assert sorted(indices, key=str) == [c["index"] for c in certificates(tmp_path / "runs")]  # each of them once


def test_who_trains_the_same_thing_waits_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Commands that differ, but for a training that they share."""
    from threading import Thread

    from bench.training.weights import Entry

    order = []

    def second() -> None:
        with Entry("shared", {"id": str(tmp_path)}).lock():
            order.append("second")

    with Entry("shared", {"id": str(tmp_path)}).lock():
        waiting = Thread(target=second)
        waiting.start()
        while "another process is training shared-" not in caplog.text:
            assert waiting.is_alive()
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


# Memory -----------------------------------------------------------------------------------------------


def test_out_of_memory_the_block_that_fits_is_found_and_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.records.writer import RunFolder

    args = ("run", "--defense", FAULTY, "--set", "how=greedy", "--dataset", TINY, "--out", tmp_path, "--json")
    real = RunFolder.append

    def append(self: RunFolder, certificate: object) -> None:
        if len(self.done) == 3:
            raise KeyboardInterrupt
        real(self, certificate)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "append", append)
    stopped = bench(*args, "--set", "rows=100")
    assert stopped.code == 130
    assert "blocks of 64 rows; 256 do not fit into memory" in stopped.err
    monkeypatch.setattr(RunFolder, "append", real)
    # More memory now: the run that is begun goes on in its own blocks.
    from bench.smoothing import blocks

    monkeypatch.setattr(blocks, "fitting_block", lambda *_: pytest.fail("a block was looked for"))
    done = bench(*args, "--set", "rows=100")
    assert done.code == 0
    (info,) = json.loads(done.out)
    assert info["identity"]["block"] == [64, 1, 8, 8]
    assert bench("verify", info["path"]).code == 0


def test_the_cpu_says_out_of_memory_in_words() -> None:
    import torch

    from bench.smoothing.blocks import out_of_memory

    with pytest.raises(RuntimeError) as e:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(e.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_too_little_memory_for_any_block_names_the_defense(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", FAULTY, "--set", "how=greedy", "--set", "rows=15", "--dataset", TINY)
    for more in ((), ("--dry-run",)):
        result = bench(*args, "--out", tmp_path, *more)
        assert result.code == 2
        last = result.err.splitlines()[-1]
        assert last.startswith(f"bench: defense {FAULTY}: out of memory") and "16 rows" in last
    assert not list(tmp_path.glob("*/certificates.jsonl"))


# Defenses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "after", "words", "kept"),
    [
        ("raises", 0, "RuntimeError: out of ideas", 0),
        ("raises", 16, "RuntimeError: out of ideas", 4),
        ("shape", 16, "float tensor of shape", 4),
        ("drifts", 4, "a row's logits change", 0),
        ("drifts", 16, "at the end of the run", 0),
        ("sleeps", 0, "no answer for 1 s", 0),
        ("sleeps", 16, "no answer for 1 s in certification", 4),
    ],
)
def test_a_defense_at_fault_is_named_and_no_vote_invented(
    bench: Bench,
    tmp_path: Path,
    set_threads: Callable[[int], None],
    how: str,
    after: int,
    words: str,
    kept: int,
) -> None:
    set_threads(1)  # the defense counts its calls, and so each thread's copy would
    args = ("--dataset", TINY, "--set", f"how={how}", "--set", f"after={after}", "--timeout", "1", "--out", tmp_path)
    result = bench("run", "--defense", f"{FAULTY},none", *args)
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith(f"bench: 1 of 2 runs failed: defense {FAULTY}: ")
    assert words in last
    assert "Traceback" not in result.err
    # The other run of the command is finished, and this one's folder holds what was certified before.
    assert json.loads(next(tmp_path.glob("tiny-none-*/run.json")).read_text())["status"] == "complete"
    files = list(tmp_path.glob("tiny-faulty-*/certificates.jsonl"))
    rows = files[0].read_text().splitlines() if files else []
    sound = {r["index"]: r for r in certificates_of(tmp_path, "none")}
    assert len(rows) == kept
    assert all({**json.loads(r), "seconds": 0} == sound[json.loads(r)["index"]] for r in rows)


@pytest.mark.parametrize(
    ("how", "words"), [("raises", "out of ideas"), ("sleeps", "no answer for 1 s in certification")]
)
def test_a_fault_in_one_of_several_threads(
    bench: Bench,
    tmp_path: Path,
    set_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    words: str,
) -> None:
    from bench.smoothing import engine

    set_threads(2)
    monkeypatch.setattr(engine, "PATIENCE", 0.1)
    args = ("--dataset", TINY, "--n", "8000", "--set", f"how={how}", "--set", "after=85", "--timeout", "1")
    result = bench("run", "--defense", f"{FAULTY},none", *args, "--out", tmp_path)
    assert result.code == 2
    last = result.err.splitlines()[-1]
    assert last.startswith(f"bench: 1 of 2 runs failed: defense {FAULTY}: ") and words in last
    rows = certificates_of(tmp_path, "faulty")
    sound = {r["index"]: r for r in certificates_of(tmp_path, "none")}
    assert 0 < len(rows) < 8
    assert all(r == sound[r["index"]] for r in rows)


def certificates_of(out: Path, name: str) -> list[dict[str, object]]:
    """The certificates of one of several runs."""
    (file,) = out.glob(f"tiny-{name}-*/certificates.jsonl")
    return [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]


def test_what_a_drifting_defense_certified_is_set_aside(
    bench: Bench, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    args = ("run", "--defense", FAULTY, "--set", "how=drifts", "--set", "after=16", "--dataset", TINY)
    for _ in range(2):  # typed again it is no sounder
        result = bench(*args, "--out", tmp_path)
        assert result.code == 2
        assert "refused.jsonl" in result.err
    (folder,) = tmp_path.iterdir()
    assert not (folder / "certificates.jsonl").exists()
    assert len((folder / "refused.jsonl").read_text().splitlines()) == 8
    assert bench("report", tmp_path).code == 2


def test_a_drift_in_one_of_several_threads_is_seen(
    bench: Bench, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(2)
    args = ("--set", "how=drifts", "--set", "after=85", "--dataset", TINY, "--n", "8000", "--out", tmp_path)
    result = bench("run", "--defense", FAULTY, *args)
    assert result.code == 2 and "at the end of the run" in result.err
    assert not list(tmp_path.glob("*/certificates.jsonl"))


def test_nan_is_no_vote_for_any_class(bench: Bench, tmp_path: Path) -> None:
    result = bench(
        "run", "--defense", FAULTY, "--set", "how=nan", "--dataset", TINY, "--out", tmp_path, "--noise", "float"
    )
    assert result.code == 0
    assert "256 of 256 rows of logits hold NaN" in result.err
    rows = certificates_of(tmp_path, "faulty")
    assert all((r["predicted"], r["radius"], r["top_count"], r["runner_up_count"]) == (None, 0.0, 0, 100) for r in rows)


def test_a_defense_that_hangs_in_c_is_named_and_ended(tmp_path: Path) -> None:
    args = ["--dataset", TINY, "--set", "how=computes", "--set", "after=16", "--timeout", "1", "--out", str(tmp_path)]
    log = tmp_path / "log"
    process = start(impatient, ["run", "--defense", FAULTY, *args], cache=cache_root(), log=log)
    process.join()
    assert process.exitcode == 2
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"bench: defense {FAULTY}: no answer for 1 s in certification")
    assert len(certificates_of(tmp_path, "faulty")) == 4


def test_a_training_that_hangs_is_named(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "stuck.py"
    mine.write_text(
        Path(defense("scaled"))
        .read_text()
        .replace("class Scaled", "import time\n\n\nclass Stuck")
        .replace("        return self", "        time.sleep(60 * self.training)\n        return self")
    )
    result = bench("run", "--defense", mine, "--dataset", TINY, "--out", tmp_path / "runs", "--timeout", "1")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"bench: defense {mine}: no answer for 1 s in training")


# Reports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["md", "html", "csv"])
def test_a_report_is_whole_or_absent(
    bench: Bench, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The last byte does not fit: the old report stays, and nothing is left beside it."""
    import os

    out = tmp_path / "report"
    assert bench("report", whole, "--format", format, "--out", out).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = bench("report", whole, "--format", format, "--out", out)
    assert result.code == 2
    assert "cannot write the report to" in result.err and "No space left on device" in result.err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
