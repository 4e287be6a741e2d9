"""Test that several threads and devices give the counts of one. Two CPU "devices" stand for GPUs."""

from __future__ import annotations

import copy
import json
import platform
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.errors import BenchError
from bench.interface import Draw
from bench.options import RunOptions
from bench.process.console import ConsoleReporter
from bench.records.record import Record
from bench.runs import certifier, session
from bench.runs.certifier import Certifier, serialized
from bench.runs.plan import make_plans
from bench.smoothing import engine
from bench.smoothing.fixed import Fixed
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.rows import Rows, add_float
from bench.smoothing.task import Model, Task
from bench.smoothing.votes import Certificate
from tests.helpers.commands import TINY, defense

CPU = torch.device("cpu")


def certificates(record: Record) -> dict[int, Certificate]:
    return {c.index: replace(c, seconds=0.0) for c in record.counted}


class Quiet(ConsoleReporter):
    """Keep all messages."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def drawn_by(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Collect the threads that draw the noise of counted votes."""
    found: set[int] = set()
    inputs = GridNoise.inputs

    def noted(self: GridNoise, images: Tensor, rows: Rows) -> Tensor:
        if "estimate" in rows.purposes:
            found.add(threading.get_ident())
        return inputs(self, images, rows)

    monkeypatch.setattr(GridNoise, "inputs", noted)
    return found


@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
def test_two_devices_certify_as_one(
    procedure: str, tmp_path: Path, drawn_by: set[int], set_threads: Callable[[int], None]
) -> None:
    (plan,) = make_plans(RunOptions(defenses="none", dataset=TINY, procedure=procedure, n=1000))
    set_threads(1)
    alone = session.Session(CPU, tmp_path / "one", Quiet()).run(plan)
    assert drawn_by == {threading.get_ident()}
    drawn_by.clear()
    together = session.Session(CPU, tmp_path / "two", Quiet(), devices=[CPU, CPU]).run(plan)
    assert len(drawn_by - {threading.get_ident()}) == 2  # this thread draws the votes of the checks at the end
    assert together.path.name == alone.path.name
    assert certificates(together) == certificates(alone)


@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
@pytest.mark.parametrize("name", ["none", defense("leaves_notes")])
def test_threads_certify_as_one(
    name: str, procedure: str, tmp_path: Path, drawn_by: set[int], set_threads: Callable[[int], None]
) -> None:
    """Each thread computes blocks with its own modules, so that state of a call in a module does no harm."""
    (plan,) = make_plans(RunOptions(defenses=name, dataset=TINY, procedure=procedure, n=3000))
    reporter = Quiet()
    set_threads(3)
    together = session.Session(CPU, tmp_path / "three", reporter).run(plan)
    assert len(drawn_by - {threading.get_ident()}) >= 2
    assert torch.get_num_threads() == 3
    assert not any("one thread" in line for line in reporter.said)
    set_threads(1)
    alone = session.Session(CPU, tmp_path / "one", Quiet()).run(plan)
    assert together.path.name == alone.path.name
    assert certificates(together) == certificates(alone)


def test_a_defense_that_cannot_be_copied_votes_in_one_thread(
    tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(3)
    mine = tmp_path / "mine.py"
    mine.write_text(
        Path(defense("leaves_notes"))
        .read_text()
        .replace("self.note = None", "self.note = __import__('_thread').allocate_lock()")
    )
    (plan,) = make_plans(RunOptions(defenses=str(mine), dataset=TINY))
    reporter = Quiet()
    session.Session(CPU, tmp_path / "three", reporter).run(plan)
    assert any("votes in one thread, not 3: TypeError" in line for line in reporter.said)


def test_nothing_is_certified_where_a_device_draws_other_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends before the first vote; ``test_noisecheck`` tests the check."""

    def differs(task: Task, index: int) -> None:
        assert task.sigma == 0.25 and index == 0
        raise BenchError("cuda:0 draws other noise than the CPU")

    monkeypatch.setattr(certifier, "check_device", differs)
    (plan,) = make_plans(RunOptions(defenses="none", dataset=TINY))
    with pytest.raises(BenchError, match="draws other noise"):
        session.Session(CPU, tmp_path, Quiet()).run(plan)
    (path,) = tmp_path.glob("*/run.json")
    assert not path.with_name("certificates.jsonl").exists()
    assert json.loads(path.read_text())["status"] == "started"


def task_of(images: int) -> Task:
    noise, shape = Noise(0, "test"), (1, 4, 4)
    pixels = np.zeros((images, *shape), np.float32)
    return Task(lambda i: pixels[i], lambda i: 0, add_float(noise, 0.5), shape, 3, 0.5, noise, 64, CPU)


@pytest.mark.parametrize("where", ["device", "thread"])
def test_an_error_in_one_thread_or_device_stops_the_run(where: str) -> None:
    def sound(x: Tensor, draw: Draw) -> Tensor:
        return x.flatten(1)[:, :3]

    def broken(x: Tensor, draw: Draw) -> Tensor:
        raise BenchError("the second is broken")

    task, fixed = task_of(30), Fixed(20, 2000, 0.001)
    device, two = engine.Device, [sound, broken]
    devices = [device(task, two)] if where == "thread" else [device(task, [model]) for model in two]
    with pytest.raises(BenchError, match="second is broken"):
        list(engine.certify(devices, lambda y: fixed.certify(0.5, y), range(30)))


def test_threads_of_one_gpu_take_turns() -> None:
    """As on a GPU: several threads call one model that keeps state of a call."""
    task, fixed = task_of(30), Fixed(20, 2000, 0.001)
    held: list[Tensor] = []

    def model(x: Tensor, draw: Draw) -> Tensor:
        held.append(x)
        time.sleep(1e-4)
        return held.pop(0).flatten(1)[:, :3]

    def run(models: list[Model]) -> list[Certificate]:
        found = engine.certify([engine.Device(task, models)], lambda y: fixed.certify(0.5, y), range(30))
        return sorted((replace(c, seconds=0.0) for c in found), key=lambda c: c.index)

    assert run([serialized(model)] * 4) == run([model])


def test_devices_whose_logits_differ_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = make_plans(RunOptions(defenses="none", dataset=TINY))
    copied = Certifier.copy

    def other(self: Certifier, share_weights: bool) -> Certifier:
        there = copied(self, share_weights)
        with torch.no_grad():
            there.base.module.head().bias += torch.arange(10.0)  # type: ignore[operator]
        return there

    monkeypatch.setattr(Certifier, "copy", other)
    with pytest.raises(BenchError, match="computes other logits"):
        session.Session(CPU, tmp_path, Quiet(), devices=[CPU, CPU]).run(plan)


def test_a_copy_queries_the_copy_of_its_base(tmp_path: Path) -> None:
    """A defense's view of its base is copied with both, and keeps its access."""
    (plan,) = make_plans(RunOptions(defenses="none", dataset=TINY))
    certifier = session.Session(CPU, tmp_path, ConsoleReporter()).prepare(plan).certifier
    defense, base = copy.deepcopy((certifier.defense, certifier.base))
    with torch.no_grad():
        base.module.head().bias += torch.arange(10.0)  # type: ignore[operator]
    x = torch.rand(4, 1, 8, 8)
    here, there = certifier.model(CPU)(x, None), Certifier("copy", defense, base).model(CPU)(x, None)  # type: ignore[arg-type]
    assert torch.allclose(there - here, torch.arange(10.0), atol=1e-4)
    assert defense.context.base.most == certifier.defense.context.base.most


def test_threads_share_a_noise_source() -> None:
    noise, votes = Noise(0, "test"), [Vote("estimate", i, 7) for i in range(300)]
    alone = noise.normals(votes, 500)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(noise.normals(votes, 500))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(alone, f) for f in found)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_a_run_keeps_the_memory_that_it_frees(tmp_path: Path) -> None:
    session.Session(CPU, tmp_path, Quiet())

    def fill(rounds: int) -> None:
        for _ in range(rounds):
            torch.ones(10_000_000)  # 40 MB: by default glibc keeps no block above 32 MB

    fill(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill(20)
    pages = 20 * 10_000_000 * 4 / resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 10
