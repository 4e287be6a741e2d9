"""``--shard i/k`` and ``bench merge``: the record of one process, made by several."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bench.io.files import digest
from bench.records.schema import Identity
from bench.records.shards import shards_in
from tests.helpers.commands import TINY, Result
from tests.helpers.records import costs, made_up

Bench = Callable[..., Result]
ONE = ("run", "--defense", "none", "--dataset", TINY)


def certificates(run: Path) -> list[dict[str, Any]]:
    """As written, without their timing."""
    return [{**json.loads(line), "seconds": 0} for line in (run / "certificates.jsonl").read_text().splitlines()]


def info(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


@pytest.mark.parametrize(
    ("more", "count"),
    [(("--procedure", "anytime"), 2), pytest.param(("--seed", "0,1", "--sigma", ".25,.5"), 8, marks=pytest.mark.slow)],
)
def test_merged_shards_equal_an_unsharded_run(bench: Bench, tmp_path: Path, more: tuple[str, ...], count: int) -> None:
    args = ("run", "--defense", "none,lora", "--dataset", TINY, *more)
    assert bench(*args, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "parts"
    first = bench(*args, "--out", out, "--shard", "1/2")
    assert first.code == 0, first.err
    assert first.out.count("complete, 4 images") == count
    assert f"bench merge {out}" in first.out
    runs = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert sorted(p.name for p in out.iterdir()) == runs
    assert not list(out.glob("*/run.json"))

    lacking = bench("merge", out)
    assert lacking.code == 1
    assert lacking.err.count("shard 2/2: not begun; finish it: bench run") == count
    assert not list(out.glob("*/run.json"))
    for line in lacking.err.splitlines():  # as a person would: the command is typed as it is printed
        assert bench(*shlex.split(line.partition("finish it: bench ")[2])).code == 0

    assert bench("merge", out).code == 0
    for name in runs:
        whole, merged = tmp_path / "whole" / name, out / name
        assert certificates(merged) == sorted(certificates(whole), key=lambda c: c["index"])
        one, other = info(whole), info(merged)
        for key in ("identity", "status", "arguments", "defense", "base", "radii"):
            assert one[key] == other[key]
        assert one["environment"] | {"commit": None} == other["environment"] | {"commit": None}
        metrics = ("images", "certified_accuracy", "abstained")
        assert [one["metrics"][k] for k in metrics] == [other["metrics"][k] for k in metrics]
        differ = {k for k in one["cost"] if one["cost"][k] != other["cost"][k]}
        assert differ <= {"certify_seconds", "calibration_seconds", "peak_memory"}
        shards = other["shards"]
        assert [s["shard"] for s in shards] == ["1/2", "2/2"]
        assert other["cost"]["certify_seconds"] == pytest.approx(sum(s["cost"]["certify_seconds"] for s in shards))
        assert other["cost"]["peak_memory"] == max(s["cost"]["peak_memory"] for s in shards)
        assert "shard" not in other
    before = [(out / name / "run.json").read_bytes() for name in runs]
    assert bench("merge", out).code == 0
    assert [(out / name / "run.json").read_bytes() for name in runs] == before
    again = bench(*args, "--out", out, "--shard", "2/2")
    assert again.code == 0 and again.err.count("already complete") == count
    assert bench("report", out).code == 0
    lora = next(name for name in runs if "lora" in name)
    shutil.rmtree(out / lora / "shard-1-of-2")  # no longer needed
    audit = bench("verify", out / lora)
    assert audit.code == 0, audit.out
    assert "give the recorded counts, exactly" in audit.out


def test_a_shard_is_not_taken_for_a_run(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert bench(*ONE, "--out", out, "--shard", "1/3").code == 0
    (run,) = out.iterdir()
    shard = run / "shard-1-of-3"
    for command in (("report", out), ("report", run)):
        result = bench(*command)
        assert result.code == 2 and "bench merge" in result.err
    baseline = ("--baseline", tmp_path / "baseline.json")
    commands: list[tuple[str | Path, ...]] = [
        ("verify", shard),
        ("export", shard),
        ("compare", shard, run),
        ("check", out, "--update", *baseline),
    ]
    for words in commands:
        said = bench(*words)
        assert said.code == 2 and "bench merge" in said.err
    (row,) = json.loads(bench("list", "runs", "--out", out, "--json").out)
    assert row == {"run": f"{run.name}/{shard.name}", "state": "complete", "images": "3/3"}


def test_another_k_and_a_run_in_one_process_share_the_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.records.writer import RunFolder

    real = RunFolder.append

    def append(self: RunFolder, certificate: object) -> None:
        if len(self.done) == 2:
            raise KeyboardInterrupt
        real(self, certificate)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "append", append)
    assert bench(*ONE, "--out", tmp_path).code == 130
    assert bench(*ONE, "--out", tmp_path, "--shard", "1/3").code == 130
    monkeypatch.setattr(RunFolder, "append", real)
    (run,) = tmp_path.iterdir()
    lacking = bench("merge", tmp_path)
    assert lacking.code == 1
    assert "shard 1/3: 2 of 3 images; finish it" in lacking.err
    for i in (1, 2):
        assert bench(*ONE, "--out", tmp_path, "--shard", f"{i}/2").code == 0
    assert bench("merge", run).code == 0
    merged = certificates(run)
    assert [c["index"] for c in merged] == info(run)["identity"]["indices"]
    assert bench(*ONE, "--out", tmp_path / "whole").code == 0
    (whole,) = (tmp_path / "whole").iterdir()
    assert merged == certificates(whole)


def test_shards_that_do_not_belong_together_are_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sigma, i in ((".25", 1), (".25", 2), (".5", 1)):
        assert bench(*ONE, "--sigma", sigma, "--out", tmp_path, "--shard", f"{i}/2").code == 0
    low, high = sorted(tmp_path.iterdir())
    shutil.copytree(low / "shard-1-of-2", tmp_path / "kept")
    shutil.rmtree(low / "shard-1-of-2")

    shutil.copytree(high / "shard-1-of-2", low / "shard-1-of-2")
    other = bench("merge", low)
    assert other.code == 2 and "a shard of another run" in other.err
    shutil.rmtree(low / "shard-1-of-2")

    shutil.copytree(low / "shard-2-of-2", low / "shard-1-of-2")
    renamed = bench("merge", low)
    assert renamed.code == 2 and "shard 2/2" in renamed.err
    shutil.rmtree(low / "shard-1-of-2")

    for change in ("first line lost", "a count edited"):
        shutil.copytree(tmp_path / "kept", low / "shard-1-of-2")
        file = low / "shard-1-of-2" / "certificates.jsonl"
        text = file.read_text()
        edited = (
            text.partition("\n")[2] if change == "first line lost" else text.replace('"votes": 120', '"votes": 121')
        )
        assert edited != text
        file.write_text(edited)
        damaged = bench("merge", low)
        assert damaged.code == 2 and "run it again" in damaged.err
        assert not (low / "run.json").exists()
        shutil.rmtree(low / "shard-1-of-2")

    (tmp_path / "kept").rename(low / "shard-1-of-2")
    monkeypatch.chdir(low)
    assert bench("merge", ".").code == 0
    assert bench("report", low).code == 0


@pytest.mark.parametrize(
    ("shard", "words"),
    [("0/2", "i from 1 to k"), ("3/2", "i from 1 to k"), ("1", "write i/k"), ("1/9", "more shards than images (8)")],
)
def test_bad_shards_are_one_line(bench: Bench, tmp_path: Path, shard: str, words: str) -> None:
    result = bench(*ONE, "--out", tmp_path, "--shard", shard)
    assert result.code == 2 and words in result.err.splitlines()[-1]
    assert not list(tmp_path.glob("*/*"))


def test_nothing_to_merge(bench: Bench, tmp_path: Path) -> None:
    result = bench("merge", tmp_path)
    assert result.code == 2 and "bench run --shard" in result.err


def test_dry_run_is_of_the_shard(bench: Bench, tmp_path: Path) -> None:
    (row,) = json.loads(bench(*ONE, "--out", tmp_path, "--shard", "3/3", "--dry-run", "--json").out)
    assert (row["images"], row["votes"]) == (2, 240)


def test_one_trains_and_the_others_wait_and_log_it(bench: Bench, tmp_path: Path) -> None:
    from bench.io.files import cache_root

    run = ("run", "--defense", "lora", "--dataset", TINY, "--seed", 77, "--out")
    before = set(cache_root().glob("tiny-lora-*"))
    assert bench(*run, tmp_path / "first").code == 0
    (entry,) = set(cache_root().glob("tiny-lora-*")) - before
    trained = (entry / "weights.safetensors").stat().st_mtime_ns
    other = FileLock(entry / ".lock")
    other.acquire()

    class Done(logging.Handler):  # the other process ends once this one has logged that it waits
        def emit(self, record: logging.LogRecord) -> None:
            other.release()

    done = Done(logging.WARNING)
    logging.getLogger("bench").addHandler(done)
    try:
        waited = bench(*run, tmp_path / "second", "--shard", "1/2")
    finally:
        logging.getLogger("bench").removeHandler(done)
    assert waited.code == 0
    assert waited.err.count(f"another process is training {entry.name}; waiting for it") == 1
    assert (entry / "weights.safetensors").stat().st_mtime_ns == trained
    (log,) = (tmp_path / "second").glob("*/*/log.txt")
    assert "WARNING another process is training" in log.read_text()


def shares(out: Path, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
    """A made-up run in two shards, what ``changes`` says of both, and what run.json of each holds."""
    whole = made_up(out / "whole", [0.1, 0.2, 0.3])
    text = (whole / "certificates.jsonl").read_text().splitlines(keepends=True)
    told, run = info(whole) | changes, out / "runs" / whole.name
    for i in (1, 2):
        lines = "".join(text[i - 1 :: 2])
        shard = run / f"shard-{i}-of-2"
        shard.mkdir(parents=True)
        (shard / "certificates.jsonl").write_text(lines)
        sha256 = hashlib.sha256(lines.encode()).hexdigest()
        (shard / "run.json").write_text(json.dumps(told | {"shard": f"{i}/2", "certificates_sha256": sha256}))
    return run, [info(shard) for shard in shards_in(run).values()]


def test_a_missing_or_unfinished_shard_is_named(bench: Bench, tmp_path: Path) -> None:
    run, told = shares(tmp_path, cost=costs(300))
    second = run / "shard-2-of-2"
    lines = (second / "certificates.jsonl").read_text()
    (second / "certificates.jsonl").write_text("")
    (second / "run.json").write_text(json.dumps(told[1] | {"status": "started"}))
    unfinished = bench("merge", run)
    assert unfinished.code == 1 and "shard 2/2: 0 of 1 images" in unfinished.err
    (second / "certificates.jsonl").write_text(lines)
    assert bench("merge", run).code == 1  # all lines are there, and it was not finished
    shutil.rmtree(second)
    missing = bench("merge", run)
    assert missing.code == 1 and "shard 2/2: not begun" in missing.err
    assert not (run / "run.json").exists()


def test_costs_that_are_not_known_stay_so(bench: Bench, tmp_path: Path) -> None:
    cost = costs(300) | {"base_forwards": None, "queries": None}
    run, _ = shares(tmp_path, cost=cost)
    assert bench("merge", run).code == 0
    merged = info(run)["cost"]
    assert (merged["votes"], merged["base_forwards"], merged["queries"]) == (600, None, None)


def test_shards_that_bench_did_not_write(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = shares(tmp_path, cost=costs(2**62))
    wrong = bench("merge", run)
    assert wrong.code == 2 and "its shards together make no run: votes" in wrong.err
    second = run / "shard-2-of-2" / "run.json"
    other = told[1] | {"identity": told[1]["identity"] | {"seed": 1}}
    second.write_text(json.dumps(other))
    with monkeypatch.context() as patch:  # 32 bits are soon found
        patch.setattr(Identity, "folder_suffix", run.name[-9:])
        wrong = bench("merge", run)
    assert wrong.code == 2 and "a shard of another run than shard-1-of-2" in wrong.err
    for i, name in enumerate(("shard-0-of-0", "shard-2-of-1", "shard-02-of-2")):
        shutil.copytree(run / "shard-1-of-2", run / name)
        assert len(shards_in(run)) == 2, i
    shutil.rmtree(run)
    imported = {"format": "cohen", "sha256": "0"}
    identity = told[0]["identity"] | {"imported": imported}
    run = run.with_name(f"x-{digest(identity)[:8]}")
    (run / "shard-1-of-1").mkdir(parents=True)
    (run / "shard-1-of-1" / "run.json").write_text(json.dumps(told[0] | {"identity": identity, "shard": "1/1"}))
    wrong = bench("merge", run)
    assert wrong.code == 2 and "which has no shards" in wrong.err
    assert not list(tmp_path.glob("runs/*/run.json"))
