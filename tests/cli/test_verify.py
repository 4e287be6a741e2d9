"""bench verify: a true record passes, any field that matters, changed, does not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records.writer import RunFolder
from tests.helpers.commands import TINY, Result, defense
from tests.helpers.records import begun, made_up

Bench = Callable[..., Result]


def started(out: Path, radii: list[float | None]) -> Path:
    """A run before its first certificate."""
    run = RunFolder(out, "digits-lora-s0.25", begun(len(radii)))
    run.close()
    return run.path


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with each procedure."""
    from bench.cli import main

    found = {}
    for kind in ("fixed", "anytime"):
        out = tmp_path_factory.mktemp(kind)
        args = ["--defense", "lora", "--dataset", TINY, "--procedure", kind, "--n", "600", "--set", "rank=4"]
        with pytest.raises(SystemExit) as stop:
            main(["run", *args, "--out", str(out)])
        assert not stop.value.code
        (found[kind],) = out.iterdir()
    return found


@pytest.mark.parametrize("kind", ["fixed", "anytime"])
def test_a_true_record_passes(bench: Bench, records: dict[str, Path], kind: str) -> None:
    result = bench("verify", records[kind])
    assert result.code == 0, result.out + result.err
    assert "wrong" not in result.out
    assert "5 images drawn again from the seed give the recorded counts, exactly" in result.out
    deep = bench("verify", records[kind], "--deep", "--json")
    assert deep.code == 0
    (one,) = json.loads(deep.out)
    assert (one["verdict"], one["images_certified_again"], one["equal_counts"]) == ("verified", 8, True)
    assert one["findings"][-1]["check"].startswith("8 images")


FIELDS = ("index", "label", "predicted", "radius", "n0", "n", "top_count", "runner_up_count", "p_lower", "votes")


@pytest.mark.parametrize("kind", ["fixed", "anytime"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_certificate_is_caught(
    bench: Bench, records: dict[str, Path], tmp_path: Path, kind: str, field: str
) -> None:
    copy = Path(shutil.copytree(records[kind], tmp_path / records[kind].name))
    file = copy / "certificates.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    row = max(rows, key=lambda r: r["radius"])
    row[field] = row[field] + (0.01 if field in ("radius", "p_lower") else 1)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for flags in ((), ("--deep",)):
        result = bench("verify", copy, *flags)
        assert result.code in (1, 2), field
        assert "FAIL:" in result.out or "bench:" in result.err
    # A forger who also updates the hash meets the counts drawn again.
    info = json.loads((copy / "run.json").read_text())
    info["certificates_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "run.json").write_text(json.dumps(info))
    assert bench("verify", copy, "--deep").code in (1, 2)


def set_at(info: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        info = info[key]
    info[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("identity.sigma", 0.5),
        ("identity.seed", 1),
        ("identity.indices", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("identity.procedure.alpha", 0.1),
        ("identity.procedure.n", 500),
        ("identity.noise.tau", 0.1),
        ("identity.base.sha256", "0"),
        ("identity.defense.weights", "0"),
        ("identity.images", "0"),
        ("metrics.acr", 9.0),
        ("cost.votes", 1),
        ("arguments.seed", "1"),
    ],
)
def test_a_changed_statement_is_caught(
    bench: Bench, records: dict[str, Path], tmp_path: Path, path: str, value: Any
) -> None:
    copy = Path(shutil.copytree(records["fixed"], tmp_path / records["fixed"].name))
    info = json.loads((copy / "run.json").read_text())
    set_at(info, path, value)
    (copy / "run.json").write_text(json.dumps(info))
    result = bench("verify", copy)
    assert result.code == 1, path
    assert "FAIL:" in result.out


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_missing_and_repeated_images_are_caught(
    bench: Bench, records: dict[str, Path], tmp_path: Path, change: str
) -> None:
    copy = Path(shutil.copytree(records["fixed"], tmp_path / records["fixed"].name))
    lines = (copy / "certificates.jsonl").read_text().splitlines(keepends=True)
    (copy / "certificates.jsonl").write_text("".join(lines[1:] if change == "missing" else [*lines, lines[0]]))
    result = bench("verify", copy)
    assert result.code == (1 if change == "missing" else 2)


def test_weights_that_are_not_here_are_said(
    bench: Bench, records: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path))
    result = bench("verify", records["fixed"])
    assert result.code == 0
    assert "not drawn again" in result.out


def test_a_shared_part_that_is_not_here_is_not_trained_without_deep(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    args = ("--defense", "denoiser", "--dataset", TINY, "--set", "objective=mse", "--set", "epochs=1")
    assert bench("run", *args, "--out", tmp_path / "runs").code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert "5 images drawn again" in bench("verify", run).out
    (part,) = (tmp_path / "cache").glob("tiny-msedenoiser-*")
    shutil.rmtree(part)
    result = bench("verify", run)
    assert result.code == 0 and "not drawn again: its trained weights are not in this cache" in result.out
    assert not part.exists()
    assert "8 images drawn again" in bench("verify", run, "--deep").out and part.exists()


def test_a_search_is_not_done_again_without_deep(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    args = ("--defense", "head", "--dataset", TINY, "--set", "epochs=1", "--search", "lr=1e-3,1e-2")
    assert bench("run", *args, "--out", tmp_path / "runs").code == 0
    (run,) = (tmp_path / "runs").iterdir()
    weights = json.loads((run / "run.json").read_text())["identity"]["defense"]["weights"]
    (other,) = (
        m.parent
        for m in (tmp_path / "cache").glob("tiny-head-*/meta.json")
        if json.loads(m.read_text())["sha256"] != weights
    )
    shutil.rmtree(other)
    assert "5 images drawn again" in bench("verify", run).out and not other.exists()
    assert "8 images drawn again" in bench("verify", run, "--deep").out and other.exists()


def test_a_defense_whose_code_has_changed_is_not_drawn_again(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(Path(defense("half_space")).read_text())
    assert bench("run", "--defense", mine, "--dataset", TINY, "--out", tmp_path / "runs").code == 0
    (run,) = (tmp_path / "runs").iterdir()
    mine.write_text(mine.read_text() + "\n# another version\n")
    verified = bench("verify", run, "--defense", mine)
    assert verified.code == 0
    assert "not drawn again: the code of defense" in verified.out and "has changed since" in verified.out
    deep = bench("verify", run, "--defense", mine, "--deep")
    assert deep.code == 1 and "defense differ from the record's" in deep.out


@pytest.mark.parametrize("made", [made_up, started])
def test_a_record_without_its_certificates_is_one_line(bench: Bench, tmp_path: Path, made: Any) -> None:
    run = made(tmp_path, [0.1, 0.2, None])
    (run / "certificates.jsonl").unlink(missing_ok=True)
    result = bench("verify", run)
    assert "Traceback" not in result.err
    if made is started:  # none is certified yet
        assert result.code == 1 and "0 of 3 images are done" in result.out
    else:
        assert result.code == 2 and result.err.count("\n") == 1
        assert "certificates.jsonl is missing" in result.err
    for command in ("report", "compare", "export", "status"):
        assert "Traceback" not in bench(command, run).err
