"""``--executor ray``: the same records as in one process, whatever happens to workers, nodes and the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Result, defense

pytest.importorskip("ray")

Bench = Callable[..., Result]


def lines(out: Path) -> dict[str, list[dict[str, object]]]:
    """Certificates by run folder, without their timing, by image."""
    found = {}
    for file in sorted(out.glob("*/certificates.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = sorted(({**r, "seconds": 0} for r in rows), key=lambda r: r["index"])
    return found


def test_the_records_of_a_cluster_are_those_of_one_process(bench: Bench, tmp_path: Path) -> None:
    """Two defenses, one of them a file, by the anytime procedure; a local run is finished on the cluster too."""
    args = ["run", "--defense", f"full,{defense('half_space')}", "--dataset", TINY, "--procedure", "anytime"]
    assert bench(*args, "--out", tmp_path / "local").code == 0
    half_done = tmp_path / "ray" / next((tmp_path / "local").glob("tiny-full-*")).name
    half_done.mkdir(parents=True)
    info = json.loads((tmp_path / "local" / half_done.name / "run.json").read_text())
    (half_done / "run.json").write_text(json.dumps({**info, "status": "started"}))
    kept = (tmp_path / "local" / half_done.name / "certificates.jsonl").read_text().splitlines(keepends=True)[:3]
    (half_done / "certificates.jsonl").write_text("".join(kept))

    ran = bench(*args, "--out", tmp_path / "ray", "--executor", "ray", "--ray-address", "local", "--json")
    assert ran.code == 0, ran.err
    assert lines(tmp_path / "ray") == lines(tmp_path / "local")
    assert (half_done / "certificates.jsonl").read_text().startswith("".join(kept))
    for record in json.loads(ran.out):
        alone = json.loads((tmp_path / "local" / Path(record["path"]).name / "run.json").read_text())
        assert record["metrics"] == alone["metrics"]
        same = ("votes", "base_forwards", "flops_per_vote", "parameters", "trainable_updated", "trained_here")
        assert {k: record["cost"][k] for k in same} == {k: alone["cost"][k] for k in same}
        assert sum(record["environment"]["workers"].values()) >= 1
    assert "at most" in ran.err
