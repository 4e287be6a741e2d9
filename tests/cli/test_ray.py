"""Test ``--executor ray``: it gives the records of a local run, even if workers, nodes or the command are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TINY, Result, defense

pytest.importorskip("ray")

Bench = Callable[..., Result]


def lines(out: Path) -> dict[str, list[dict[str, object]]]:
    """Read the certificates of each run folder, sorted by image, without their timing."""
    found = {}
    for file in sorted(out.glob("*/certificates.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = sorted(({**r, "seconds": 0} for r in rows), key=lambda r: r["index"])
    return found


@pytest.mark.slow  # Ray gives up starting if no core is idle for a while, as during the rest of the suite
def test_the_records_of_a_cluster_are_those_of_one_process(bench: Bench, tmp_path: Path) -> None:
    """Run two defenses, one of them a file, by the anytime procedure; one run was begun locally."""
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


@pytest.mark.slow
def test_a_study_on_a_cluster_names_the_folder_of_each_run(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(f'dataset = "{TINY}"\nexamples = 4\n[[run]]\ndefense = ["full", "none"]\nsigma = [0.25, 0.5]\n')
    first = ["run", "--defense", "none", "--dataset", TINY, "--examples", "4", "--sigma", ".5"]
    assert bench(*first, "--out", tmp_path / "runs").code == 0  # so that one run is complete before the others
    ran = bench("run", file, "--executor", "ray", "--ray-address", "local")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "runs" / "study.study.json").read_text())["runs"]
    assert [run["folder"].rpartition("-")[0] for run in found] == [run["label"].split(",")[0] for run in found]
    assert len({run["folder"] for run in found}) == 4
    assert bench("report", file, "--format", "csv").out.count("\n") == 5


@pytest.mark.slow
def test_a_faulty_defense_on_a_cluster_is_named_and_the_other_run_finishes(bench: Bench, tmp_path: Path) -> None:
    faulty = defense("faulty")
    args = ["run", "--defense", f"{faulty},none", "--dataset", TINY, "--set", "faulty.how=sleeps"]
    args += ["--set", "faulty.after=16", "--timeout", "2"]
    ran = bench(*args, "--out", tmp_path, "--executor", "ray", "--ray-address", "local")
    assert ran.code == 2
    last = ran.err.splitlines()[-1]
    assert last.startswith(f"bench: 1 of 2 runs failed: defense {faulty}: no answer for 2 s in certification")
    assert "| none " in ran.out
    states = {row["run"].split("-")[1]: row for row in json.loads(bench("status", tmp_path, "--json").out)}
    assert {name: row["state"] for name, row in states.items()} == {"faulty": "failed", "none": "complete"}
    assert "no answer for 2 s" in states["faulty"]["note"]
    log = next(tmp_path.glob("tiny-none-*/log.txt")).read_text()
    for words in ("started: bench run", "loading tiny", "8 images, fixed procedure", "finished: 8 images"):
        assert log.count(words) == 1


@pytest.mark.slow
def test_ctrl_c_on_a_cluster_says_how_to_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "run", "--defense", "none", "--dataset", TINY, "--n", "400000"]
    command += ["--out", str(tmp_path / "runs"), "--executor", "ray", "--ray-address", "local"]

    def heed_ctrl_c() -> None:  # children of a suite started in the background inherit that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    env = {**os.environ, "OMP_NUM_THREADS": "1", "CERTBENCH_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=-1, preexec_fn=heed_ctrl_c)
    while not done(tmp_path / "runs") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    err = process.stderr.read().decode()
    assert process.wait() == 130
    assert err.splitlines()[-1] == ("bench: interrupted; all certified images are kept: repeat the command to resume")
    assert "Traceback" not in err
    (log,) = (tmp_path / "runs").glob("*/log.txt")
    assert log.read_text().splitlines()[-1].endswith("INFO interrupted")


def test_ray_must_be_requested_and_installed(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path)
    wrong = bench(*args, "--executor", "rya")
    assert (wrong.code, wrong.err) == (2, "bench: unknown --executor 'rya'; did you mean ray?\n")
    alone = bench(*args, "--ray-address", "somewhere:6379")
    assert (alone.code, alone.err) == (2, "bench: --ray-address somewhere:6379: give --executor ray too\n")
    served = bench(*args, "--executor", "ray", "--base", "http://localhost:1/v2/models/m")
    assert served.code == 2 and "served elsewhere" in served.err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = bench(*args, "--executor", "ray")
    assert (missing.code, missing.err) == (
        2,
        "bench: --executor ray: Ray is not installed; pip install 'certbench[ray]'\n",
    )


class Nodes:
    """Start a Ray cluster on this machine, with separate processes for each node."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = str(self._cluster.address)
        self._nodes = [self.add(), self.add()]

    def add(self) -> Any:
        return self._cluster.add_node(num_cpus=1)

    def remove_one(self) -> None:
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def kill_one(self, name: str) -> bool:
        """SIGKILL one of the cluster's processes of that name."""
        listed = subprocess.run(["ps", "-ewwo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        raylets = {pid for pid, _, args in rows if "raylet/raylet" in args and self.address in args}
        for pid, parent, args in rows:
            if parent in raylets and args.startswith(f"ray::{name}"):
                os.kill(int(pid), signal.SIGKILL)
                return True
        return False

    def close(self) -> None:
        self._cluster.shutdown()


def done(out: Path) -> int:
    return sum(len(f.read_text().splitlines()) for f in out.glob("*/certificates.jsonl"))


@pytest.mark.slow
def test_killed_workers_nodes_and_commands_lose_nothing(tmp_path: Path) -> None:
    """Kill a training, a worker, a node and the command itself during a run."""
    args = [sys.executable, "-m", "bench", "run", "--defense", "full,none", "--dataset", TINY, "--examples", "40"]
    args += ["--n", "4000", "--set", "epochs=40"]

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CERTBENCH_CACHE": str(tmp_path / f"cache-{out}")}
        with (tmp_path / f"{out}.err").open("ab") as err:
            return subprocess.Popen([*args, "--out", str(tmp_path / out), *more], env=env, stdout=err, stderr=err)

    def said(out: str) -> str:
        return (tmp_path / f"{out}.err").read_text()

    nodes = Nodes()
    try:
        on_ray = ("ray", "--executor", "ray", "--ray-address", nodes.address)
        command = start(*on_ray)
        disturbances = [
            (0, lambda: nodes.kill_one("prepare")),
            (5, lambda: nodes.kill_one("VoteWorker")),
            (20, lambda: nodes.remove_one() or True),
            (35, lambda: command.kill() or True),
        ]
        for wanted, disturb in disturbances:
            while done(tmp_path / "ray") < wanted or not disturb():
                assert command.poll() is None, said("ray")
                time.sleep(0.05)
        command.wait()
        kept = {f: f.read_text() for f in tmp_path.glob("ray/*/certificates.jsonl")}
        assert 35 <= sum(len(text.splitlines()) for text in kept.values()) < 80
        nodes.add()
        assert start(*on_ray).wait() == 0, said("ray")
        for file, text in kept.items():
            assert file.read_text().startswith(text[: text.rfind("\n") + 1])
    finally:
        nodes.close()
    assert start("local").wait() == 0, said("local")
    assert lines(tmp_path / "ray") == lines(tmp_path / "local")
    assert [len(rows) for rows in lines(tmp_path / "ray").values()] == [40, 40]


@pytest.mark.slow
def test_drift_of_workers_that_died_is_detected(tmp_path: Path) -> None:
    """Two workers drift and are killed; their successors do not drift, so only the counted votes show it.

    One of some 300 batches of each dead worker is drawn again; at most 26 of these were drawn before the drift. The
    chance that neither redrawn batch shows the drift is below 1%.
    """
    flag = tmp_path / "flag"
    flag.touch()
    args = [
        "run",
        "--defense",
        defense("careless"),
        "--set",
        "how=drifts",
        "--set",
        "after=40",
        "--set",
        f"flag={flag}",
    ]
    args += ["--dataset", TINY, "--examples", "40", "--n", "8000", "--out", str(tmp_path / "ray")]
    nodes = Nodes()
    try:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CERTBENCH_CACHE": str(tmp_path / "cache")}
        with (tmp_path / "err").open("wb") as err:
            command = [sys.executable, "-m", "bench", *args, "--executor", "ray", "--ray-address", nodes.address]
            process = subprocess.Popen(command, env=env, stdout=err, stderr=err)
        for wanted in (18, 19):
            while done(tmp_path / "ray") < wanted or not nodes.kill_one("VoteWorker"):
                assert process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.05)
            flag.unlink(missing_ok=True)
        assert process.wait() == 2, (tmp_path / "err").read_text()
    finally:
        nodes.close()
    said = (tmp_path / "err").read_text()
    assert "votes of the worker on" in said and "differ when they are drawn again" in said
    assert list(tmp_path.glob("ray/*/refused.jsonl")) and not list(tmp_path.glob("ray/*/certificates.jsonl"))
