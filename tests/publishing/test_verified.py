"""bench verify on published runs: with the cache, with published weights, and on forged ones."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench.publishing import weights
from bench.records.record import read_run
from tests.helpers.commands import Bench
from tests.helpers.publishinghub import PublishingHub
from tests.helpers.records import made_up

ROOT = Path(__file__).parents[2]
TO = "hub:someone/results"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine, as it were: an empty cache of trained weights."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    return tmp_path / "empty"


def test_a_run_without_its_weights_is_not_verified(
    bench: Bench, hub: PublishingHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lora = next(trained.glob("tiny-lora*"))
    assert bench("publish", lora, "--to", TO).code == 0
    commit = hub.repos["someone/results"][-1][0]
    result = bench("verify", TO, "--json")
    assert result.code == 0
    (one,) = json.loads(result.out)
    assert (one["verdict"], one["images_certified_again"], one["equal_counts"]) == ("verified", 5, True)
    assert (one["source"], one["revision"], one["weights"]) == (TO, commit, None)
    assert (
        f"{lora.name} of {TO}@{commit}: verified: 5 images certified again, with equal counts"
        in bench("verify", TO).out
    )
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    result = bench("verify", TO, "--json")
    assert result.code == 0  # no check failed
    (one,) = json.loads(result.out)
    assert one["verdict"] == "not verified" and "its trained weights are not in this cache" in one["why"]
    assert one["images_certified_again"] == 0


def test_a_run_that_cannot_be_read_or_rebuilt_does_not_stop_the_others(
    bench: Bench, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    runs = shutil.copytree(trained, tmp_path / "runs")
    (good,), (absent,) = (list(runs.glob(f"tiny-{defense}-*")) for defense in ("lora", "none"))
    info = json.loads((absent / "run.json").read_text())
    info["arguments"]["dataset"] = "no-such-card"
    (absent / "run.json").write_text(json.dumps(info))
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.json").write_text("{")
    result = bench("verify", runs, "--json")
    assert result.code == 2 and "2 of 3 runs were not checked to the end; damaged: " in result.err
    found = {one["run"]: one for one in json.loads(result.out)}
    assert {name: one["verdict"] for name, one in found.items()} == {
        "damaged": "not verified",
        good.name: "verified",
        absent.name: "not verified",
    }
    assert "no-such-card" in found[absent.name]["why"] and "run.json" in found["damaged"]["why"]
    assert (found["damaged"]["identity"], found["damaged"]["findings"]) == (None, [])
    assert f"{good.name}: verified" in bench("verify", runs).out


def test_published_weights_verify_a_run_elsewhere_and_stay_out_of_the_cache(
    bench: Bench, hub: PublishingHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sent = bench("publish", trained, "--to", TO, "--weights")
    assert sent.code == 0, sent.err
    files = hub.files("someone/results")
    entries = {p.split("/")[1] for p in files if p.startswith("weights/")}
    assert {re.sub(r"-[0-9a-f]{16}$", "", e) for e in entries} == {"tiny-base-vit", "tiny-lora-s0.25"}
    assert b"has the trained weights of 2 trainings" in files["README.md"]
    assert "nothing to send" in bench("publish", trained, "--to", TO, "--weights").out

    empty = tmp_path / "empty"
    monkeypatch.setenv("CERTBENCH_CACHE", str(empty))
    result = bench("verify", TO, "--json")
    assert result.code == 0, result.out + result.err
    found = {one["run"].split("-")[1]: one for one in json.loads(result.out)}
    assert found.keys() == {"none", "lora"}
    for one in found.values():
        assert (one["verdict"], one["weights"], one["images_certified_again"]) == ("verified", "published", 5)
    assert not list(empty.glob("*"))

    # Certificates of other weights: the forger makes everything in the record agree.
    forged = Path(shutil.copytree(trained, tmp_path / "forged" / "runs"))
    folder = tmp_path / "forged"
    assert bench("publish", forged, "--to", folder / "out").code == 0
    for path in (p for p in files if p.startswith("weights/")):
        (folder / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "out" / path).write_bytes(files[path])
    assert {one["verdict"] for one in json.loads(bench("verify", folder / "out", "--json").out)} == {"verified"}
    (meta,) = (folder / "out" / "weights").glob("tiny-base-vit*/meta.json")
    tensors = meta.with_name("weights.safetensors")
    state = load_file(tensors)
    (head,) = (k for k in state if k.endswith("head.bias"))
    state[head] = state[head] + 1
    save_file(state, tensors)
    broken = bench("verify", folder / "out")
    assert broken.code == 2 and "not the file that its meta.json describes" in broken.err
    stated = json.loads(meta.read_text()) | {"sha256": hashlib.sha256(tensors.read_bytes()).hexdigest()}
    meta.write_text(json.dumps(stated))
    failed = bench("verify", folder / "out", "--json")
    assert failed.code == 1
    assert {one["verdict"] for one in json.loads(failed.out)} == {"failed"}
    assert "cannot be rebuilt here: base" in json.loads(failed.out)[0]["why"]


@pytest.mark.usefixtures("elsewhere")
def test_weights_that_do_not_fit_are_a_failed_check(bench: Bench, trained: Path, tmp_path: Path) -> None:
    lora = next(trained.glob("tiny-lora*"))
    assert bench("publish", lora, "--to", tmp_path / "out").code == 0
    entry = tmp_path / "out" / "weights" / "tiny-lora-0"
    entry.mkdir(parents=True)
    weights = json.loads((lora / "run.json").read_text())["identity"]["defense"]["weights"]
    (entry / "meta.json").write_text(json.dumps({"identity": {}, "sha256": weights}))
    (entry / "weights.safetensors").write_bytes(b"\x80\x02 a pickle")
    result = bench("verify", tmp_path / "out")
    assert result.code == 2 and "pickled checkpoint, refused" in result.err
    (entry / "meta.json").write_text('{"identity": [], "sha256": 3}')
    result = bench("verify", tmp_path / "out")
    assert result.code == 2 and "meta.json: identity" in result.err


def test_a_run_at_the_root_of_the_file_system_has_no_published_weights(tmp_path: Path) -> None:
    """As a container has it that mounts one run, where no test may write."""
    run = made_up(tmp_path, [0.3, None])
    assert weights.published(replace(read_run(run), path=Path("/") / run.name)) is None


def test_a_forged_count_fails_where_it_is_drawn_again(
    bench: Bench, hub: PublishingHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every count is raised, and all numbers that follow from it; hashes too."""
    from bench.records import metrics

    monkeypatch.chdir(ROOT)
    run = Path(shutil.copytree(next(trained.glob("tiny-none*")), tmp_path / next(trained.glob("tiny-none*")).name))
    record = read_run(run)
    rows = [json.loads(line) for line in (run / "certificates.jsonl").read_text().splitlines()]
    for row in rows:
        top = row["n"]
        p_lower, radius = record.identity.procedure.recompute(0.25, row["n"], top, record.identity.noise.tau)
        row |= {"top_count": top, "runner_up": None, "runner_up_count": 0, "p_lower": p_lower, "radius": radius}
        row["predicted"] = row["label"]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (run / "certificates.jsonl").write_bytes(data)
    info = json.loads((run / "run.json").read_text()) | {"certificates_sha256": hashlib.sha256(data).hexdigest()}
    (run / "run.json").write_text(json.dumps(info))
    info["metrics"] = metrics.summarise(read_run(run).certificates, info["radii"]).as_json()
    (run / "run.json").write_text(json.dumps(info))
    assert bench("publish", run, "--to", TO).code == 0  # nothing in the record alone shows it
    assert bench("report", TO).code == 0
    result = bench("verify", TO, "--json")
    assert result.code == 1
    (one,) = json.loads(result.out)
    assert one["verdict"] == "failed" and "votes, not" in one["why"]
