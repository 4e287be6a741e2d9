"""Test kill -9 at random moments: the repeated commands lose nothing, repeat nothing and give the same counts."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.io.files import file_sha256
from tests.helpers.apart import run, start, whole_lines
from tests.helpers.commands import TINY

IMAGES = 60
ARGS = ["run", "--defense", "full", "--dataset", TINY, "--examples", str(IMAGES), "--n", "400", "--set", "epochs=8"]
PHASES = ("training", "certification", "report writing")


class Job:
    """Run, report and baseline in one process, which can be killed and restarted."""

    def __init__(self, place: Path) -> None:
        self.out, self.cache, self.report = place / "runs", place / "cache", place / "report"
        self.baseline, self.log = place / "baseline.json", place / "log"
        place.mkdir()
        self.kept: list[str] = []
        self._written: dict[Path, bytes] = {}

    def begin(self) -> None:
        """Start the commands."""
        self._from, out = self.phase(), str(self.out)
        self.log.unlink(missing_ok=True)
        report = ["report", out, "--out", str(self.report)]
        check = ["check", out, "--baseline", str(self.baseline), "--update"]
        self._process = start(run, [[*ARGS, "--out", out], report, check], cache=self.cache, log=self.log)

    def phase(self) -> int:
        """Return its phase, judged by the files on disk."""
        files = list(self.out.glob("*/run.json"))
        return 0 if not files else 2 if json.loads(files[0].read_text())["status"] == "complete" else 1

    def reach(self, phase: int) -> None:
        """Wait until the process reaches a phase."""
        while self._process.is_alive():
            log = self.said()
            resumed = "already complete" in log or self._from < 2
            if phase == 0 or (self.phase() == 2 and resumed) or (phase == 1 and "procedure, at most" in log):
                break
            time.sleep(0.005)

    def kill(self) -> bool:
        """Send kill -9; returns whether the process was alive."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def finish(self) -> None:
        """Wait until it exits with code 0."""
        self._process.join()
        assert self._process.exitcode == 0, self.log.read_text()

    def said(self) -> str:
        """Return the output of the process; it may be killed before it has a log."""
        return self.log.read_text() if self.log.exists() else ""

    def check(self) -> None:
        """Check that all files are whole and that earlier certificates are unchanged."""
        now = whole_lines(self.out)
        assert now[: len(self.kept)] == self.kept
        self.kept = now
        for meta in self.cache.glob("*/meta.json"):
            assert file_sha256(meta.with_name("weights.safetensors")) == json.loads(meta.read_text())["sha256"]
        for file in [*self.report.glob("[!.]*"), *self.baseline.parent.glob("baseline.json")]:
            assert self._written.setdefault(file, file.read_bytes()) == file.read_bytes()
        assert "Traceback" not in self.said()

    def result(self) -> tuple[list[dict[str, object]], list[str]]:
        """Return the certificates by image, without seconds, and the names of all files."""
        rows = [{**json.loads(line), "seconds": 0} for line in whole_lines(self.out)]
        files = {p.relative_to(folder) for folder in (self.out, self.cache) for p in folder.rglob("*") if p.is_file()}
        visible = {p for p in self.report.iterdir() if not p.name.startswith(".")}
        return sorted(rows, key=lambda r: str(r["index"])), sorted([*map(str, files), *(p.name for p in visible)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[float]]:
    """Run a job without kills; returns it and the duration of each phase."""
    job = Job(tmp_path_factory.mktemp("undisturbed") / "job")
    job.begin()
    times = [time.monotonic()]
    for phase in (1, 2):
        job.reach(phase)
        times.append(time.monotonic())
    job.finish()
    times.append(time.monotonic())
    job.check()
    return job, [after - before for before, after in itertools.pairwise(times)]


def killed(job: Job, phases: Sequence[int], seconds: list[float], rng: random.Random) -> Counter[str]:
    """Kill it in each phase, at a moment drawn uniformly from the phase's duration, then let it finish."""
    hits: Counter[str] = Counter()
    for phase in phases:
        job.begin()
        job.reach(phase)
        # A resumed certification is shorter, since some images are done.
        left = 1 - len(job.kept) / IMAGES if phase == 1 else 1
        time.sleep(rng.uniform(0, left * seconds[phase]))
        moment = PHASES[job.phase()]
        hits[moment] += job.kill()
        job.check()
    job.begin()
    job.finish()
    job.check()
    return hits


def test_killed_five_times_equals_undisturbed(undisturbed: tuple[Job, list[float]], tmp_path: Path) -> None:
    whole, seconds = undisturbed
    job = Job(tmp_path / "job")
    hits = killed(job, [0, 0, 1, 2, 2], [0.8 * s for s in seconds], random.Random(0))
    assert sum(hits.values()) == 5
    assert job.result() == whole.result()


@pytest.mark.slow
def test_killed_two_hundred_times_equals_undisturbed(undisturbed: tuple[Job, list[float]], tmp_path: Path) -> None:
    whole, seconds = undisturbed
    rng = random.Random(0)
    hits: Counter[str] = Counter()
    jobs, began = 0, time.monotonic()
    while sum(hits.values()) < 200:
        job = Job(tmp_path / "job")
        phases = sorted(p for p in range(3) for _ in range(rng.randint(0, 4)))
        hits += killed(job, phases, seconds, rng)
        assert job.result() == whole.result()
        shutil.rmtree(tmp_path / "job")
        jobs += 1
    took = ", ".join(f"{name} {s:.1f} s" for name, s in zip(PHASES, seconds, strict=True))
    kills = ", ".join(f"{hits[name]} in {name}" for name in PHASES)
    print(f"\nundisturbed: {took}\n{sum(hits.values())} kills in {jobs} jobs: {kills}; every job ended as undisturbed")
    print(f"{time.monotonic() - began:.0f} s")
    assert all(hits[name] >= 30 for name in PHASES)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    env = {**os.environ, "CERTBENCH_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bench", *ARGS, "--n", "40000", "--out", str(tmp_path / "runs")]

    def heed_ctrl_c() -> None:  # children of a suite started in the background inherit that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=-1, preexec_fn=heed_ctrl_c)
    while not list((tmp_path / "runs").glob("*/certificates.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    err = process.stderr.read().decode()
    assert process.wait() == 130
    assert "repeat the command to resume" in err
    assert "Traceback" not in err
