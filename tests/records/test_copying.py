"""Copies of records for a repository: read as the run is, without paths, and bounded when they are read."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.io import limits
from bench.records import audit, lines
from bench.records.copying import copy_record
from bench.records.record import read_run
from bench.records.writer import RunFolder
from tests.helpers.commands import Result
from tests.helpers.records import begun, edit, made_up

Bench = Callable[..., Result]
RADII = [0.3, 0.1, None, 0.6] * 25


def test_a_copy_is_reported_verified_and_compared_as_the_run(bench: Bench, tmp_path: Path) -> None:
    runs, copies = tmp_path / "runs", tmp_path / "copies"
    for name in ("one", "two"):
        (made_up(runs, RADII, name=name) / "log.txt").write_text("started in /home/someone\n")
    assert bench("export", runs, "--record", copies).code == 0
    for run in runs.iterdir():
        files = {f.name: f for f in (copies / run.name).iterdir()}
        assert files.keys() == {"run.json", "certificates.jsonl.gz"}
        assert json.loads(files["run.json"].read_text()) == json.loads((run / "run.json").read_text())
        plain = run / "certificates.jsonl"
        assert gzip.decompress(files["certificates.jsonl.gz"].read_bytes()) == plain.read_bytes()
        assert files["certificates.jsonl.gz"].stat().st_size < plain.stat().st_size / 4
        result = bench("verify", copies / run.name)
        assert "ok:   the certificates are the file that the finished run wrote" in result.out
        assert result.out == bench("verify", run).out
    for format in ("md", "json"):
        assert bench("report", copies, "--format", format).out == bench("report", runs, "--format", format).out
    compared = bench("compare", *sorted(copies.iterdir())).out
    assert compared.replace(str(copies), str(runs)) == bench("compare", *sorted(runs.iterdir())).out
    assert bench("status", copies).out.count("100/100") == 2
    first, again = sorted(copies.iterdir())[0], tmp_path / "again"
    assert bench("export", first, "--record", again).code == 0  # a copy of a copy is the same copy
    name = "certificates.jsonl.gz"
    assert (again / first.name / name).read_bytes() == (first / name).read_bytes()


def test_paths_of_the_machine_are_shortened_and_reported(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path / "runs", RADII)
    info = json.loads((run / "run.json").read_text())
    kept = {"settings": ["lora.rank=4"], "dataset": "./cards/tiny.toml", "note": "1/2 of a / b"}
    named = {"base": "/home/someone/vit.safetensors", "defenses": "~/work/my.py", "set": "a=/data/x/y.npy"}
    info["arguments"] = {**kept, **named, "weights": r"C:\Users\someone\w.pt"}
    (run / "run.json").write_text(json.dumps(info))
    result = bench("export", run, "--record", tmp_path / "copies")
    assert result.code == 0, result.err
    (file,) = (tmp_path / "copies").glob("*/run.json")
    found = json.loads(file.read_text())["arguments"]
    assert found == {**kept, "base": "vit.safetensors", "defenses": "my.py", "set": "a=y.npy", "weights": "w.pt"}
    for line in ("arguments.base: /home/someone/vit.safetensors is written as vit.safetensors", "arguments.weights"):
        assert line in result.err
    assert "someone" not in file.read_text()


def test_what_is_no_finished_sound_run_is_not_copied(bench: Bench, tmp_path: Path) -> None:
    unfinished = RunFolder(tmp_path / "a", "digits-lora-s0.25", begun(3))
    unfinished.close()
    forged = edit(made_up(tmp_path / "b", RADII), radius=0.7)
    good = made_up(tmp_path / "c", RADII)
    for run, words in ((unfinished.path, "unfinished"), (forged, "was changed after the run finished")):
        refused = bench("export", run, "--record", tmp_path / "copies")
        assert refused.code == 2 and words in refused.err
    unfinished.path.rename(good.parent / unfinished.path.name)
    both = bench("export", good.parent, "--record", tmp_path / "sound")
    assert both.code == 1 and "left out: " in both.err and "unfinished" in both.err
    assert [f.name for f in (tmp_path / "sound").iterdir()] == [good.name]
    refused = bench("export", good, "--record", good.parent)
    assert refused.code == 2 and "is a run, not a copy of one" in refused.err
    refused = bench("export", good, "--record", tmp_path / "copies", "--out", tmp_path / "log.tsv")
    assert refused.code == 2 and "give one of them" in refused.err
    assert not (tmp_path / "copies").exists()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a run."""
    return copy_record(read_run(made_up(tmp_path / "runs", RADII)), tmp_path / "copies")[0]


def test_a_changed_line_of_a_copy_is_found(copy: Path) -> None:
    file = copy / lines.COMPRESSED
    assert audit.problem(read_run(copy)) == ""
    text = gzip.decompress(file.read_bytes()).replace(b'"seconds": 0.5', b'"seconds": 0.6', 1)
    file.write_bytes(gzip.compress(text))
    assert "was changed after the run finished" in audit.problem(read_run(copy))


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_damaged_copy_is_an_error_in_one_line(bench: Bench, copy: Path, kept: int) -> None:
    file = copy / lines.COMPRESSED
    file.write_bytes(file.read_bytes()[:kept] if kept else b"no gzip file at all")
    result = bench("verify", copy)
    assert result.code == 2 and result.err.count("\n") == 1 and "certificates.jsonl.gz: unreadable" in result.err
    assert "unreadable" in bench("status", copy).out


def test_a_decompression_bomb_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 MB of zeros in 200 kB: refused at the first line, without unpacking the rest."""
    (copy / lines.COMPRESSED).write_bytes(gzip.compress(bytes(200 * limits.MB)))
    with pytest.raises(BenchError, match="a line of more than 10,000 bytes"):
        read_run(copy)
    (copy / lines.COMPRESSED).write_bytes(gzip.compress(b"{}\n" * limits.MB))
    monkeypatch.setattr(limits, "UNPACKED", limits.MB)
    with pytest.raises(BenchError, match="holds more than 1 MB"):
        lines.sha256(copy / lines.COMPRESSED)


def test_two_files_of_certificates_are_refused(bench: Bench, copy: Path) -> None:
    shutil.copy(copy.parents[1] / "runs" / copy.name / lines.NAME, copy)
    refused = bench("verify", copy)
    assert refused.code == 2 and "move one of them away" in refused.err


def test_a_copy_is_not_written_again_by_a_run(copy: Path) -> None:
    """Repeating the command of a copied run finds it complete; a copy made unfinished by hand is refused."""
    info = begun(len(RADII))
    found = RunFolder(copy.parent, "digits-lora-s0.25", info)
    found.close()
    assert found.info.complete and len(found.done) == len(RADII)
    stored = json.loads((copy / "run.json").read_text())
    for name in ("cost", "metrics", "certificates_sha256"):
        del stored[name]
    (copy / "run.json").write_text(json.dumps(stored | {"status": "running"}))
    with pytest.raises(BenchError, match="unpack it with gunzip"):
        RunFolder(copy.parent, "digits-lora-s0.25", info)
