"""Records of certbench 0.1.0, made by that version: they are read, reported and verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.io.files import digest
from bench.options import RunOptions
from bench.records.record import read_run
from bench.smoothing import gridnoise
from tests.helpers.commands import TESTS, Bench

RECORDS = TESTS / "cli" / "golden" / "certbench-0.1.0"
NONE, HEAD = "digits-none-s0.25-f8d6293b", "digits-head-s0.25-083e5724"


@pytest.mark.parametrize("name", [NONE, HEAD])
def test_it_is_read_without_a_change(name: str) -> None:
    stored = json.loads((RECORDS / name / "run.json").read_text())
    record = read_run(RECORDS / name)
    assert record.info.environment.certbench == "0.1.0"
    assert record.info.as_json() == stored
    assert record.identity.sha256 == digest(stored["identity"]) and name.endswith(record.identity.folder_suffix)


def test_both_are_reported_in_one_table(bench: Bench) -> None:
    result = bench("report", RECORDS, "--format", "json")
    assert result.code == 0
    (table,) = json.loads(result.out)["tables"]
    assert {row["run"]: row["certified_0.25"] for row in table["rows"]} == {NONE: 0.2, HEAD: 0.35}


def test_an_unchanged_defense_is_drawn_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS.parent)  # its base is a file of the repository
    runs = shutil.copytree(RECORDS, tmp_path / "runs")
    verified = bench("verify", runs / NONE)
    assert verified.code == 0, verified.out
    assert "5 images drawn again from the seed give the recorded counts" in verified.out
    verified = bench("verify", runs / HEAD)
    assert verified.code == 0 and "not drawn again: its trained weights are not in this cache" in verified.out


def of_noise(run: Path, version: str) -> Path:
    """Change the version of a record's grid noise, and its name with it."""
    stored = json.loads((run / "run.json").read_text())
    stored["identity"]["noise"]["grid_version"] = version
    (run / "run.json").write_text(json.dumps(stored))
    return run.rename(run.with_name(f"digits-none-s0.25-{digest(stored['identity'])[:8]}"))


def test_every_image_of_the_older_noise_is_drawn_again_with_exact_counts(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By AES, although runs of now draw ChaCha20; --fresh draws its new noise by AES too."""
    monkeypatch.chdir(TESTS.parent)
    run = shutil.copytree(RECORDS / NONE, tmp_path / NONE)
    stored = json.loads((run / "run.json").read_text())
    assert stored["identity"]["noise"]["grid_version"] == "aes128ctr-grid64-1" != gridnoise.VERSION
    seen: list[tuple[type, str]] = []
    for kind in gridnoise.KINDS.values():
        draw = kind.draw

        def noted(self: Any, votes: Any, size: int, draw: Any = draw) -> Any:
            seen.append((type(self), self._arguments[0].split))
            return draw(self, votes, size)

        monkeypatch.setattr(kind, "draw", noted)
    verified = bench("verify", run, "--deep", "--fresh")
    assert verified.code == 0, verified.out
    assert "20 images drawn again from the seed give the recorded counts" in verified.out
    assert "the certificates hold on fresh noise" in verified.out
    assert set(seen) == {(gridnoise.AesGridNoise, "test"), (gridnoise.AesGridNoise, "audit")}
    # Noise of the other version would be noticed: already the logits of the first block, which is noisy, differ.
    other = bench("verify", of_noise(run, gridnoise.VERSION))
    assert other.code == 1 and "the function built here is not the one certified: logits differ" in other.out


def test_noise_of_an_unknown_version_is_refused(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS.parent)
    run = shutil.copytree(RECORDS / NONE, tmp_path / NONE)
    result = bench("verify", of_noise(run, "later-1"))
    assert result.code == 2
    assert "its grid noise is of version later-1, which this certbench does not draw" in result.err


def test_a_run_of_the_older_noise_is_not_resumed_but_done_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started or complete: its folder stays as it is, the new one starts at its first image, and a line says why."""
    monkeypatch.chdir(TESTS.parent)
    out = tmp_path / "runs"
    run = shutil.copytree(RECORDS / NONE, out / NONE)
    stored = json.loads((run / "run.json").read_text())
    started = {k: v for k, v in stored.items() if k not in ("cost", "metrics", "certificates_sha256", "audit")}
    (run / "run.json").write_text(json.dumps(started | {"status": "started"}))
    lines = (run / "certificates.jsonl").read_text().splitlines(keepends=True)
    (run / "certificates.jsonl").write_text("".join(lines[:7]))
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    words = RunOptions.of(stored["arguments"]).command("--out", str(out)).split()
    result = bench(*words[words.index("run") :])
    assert result.code == 0, result.err
    problem = f"{run} is of grid noise aes128ctr-grid64-1, whose votes are not mixed with those of {gridnoise.VERSION}"
    assert problem in result.out + result.err
    (made,) = set(out.glob("digits-*/")) - {run}
    assert f"{made.name} starts from its first image" in result.out + result.err
    assert {f.name: f.read_bytes() for f in run.iterdir()} == before
    new, old = (json.loads((folder / "run.json").read_text())["identity"] for folder in (made, run))
    assert new["noise"].pop("grid_version") == gridnoise.VERSION and old["noise"].pop("grid_version")
    assert new == old and len((made / "certificates.jsonl").read_text().splitlines()) == 20
    again = bench(*words[words.index("run") :])
    assert again.code == 0 and "aes128ctr" not in again.out + again.err
