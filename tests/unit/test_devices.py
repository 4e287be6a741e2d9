"""Several devices in one process: the counts of one. Two CPU "devices" stand for GPUs, each with a copy of its own."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import Tensor

from bench import certify, run
from bench.certification import Certifier
from bench.console import ConsoleReporter
from bench.errors import BenchError
from bench.interface import Draw
from bench.noise import Noise, Vote, add_float
from bench.plan import make_plans
from bench.procedures import Fixed
from bench.scheduler import Certificate
from bench.store import Record

CPU = torch.device("cpu")


def certificates(record: Record) -> dict[int, Certificate]:
    return {c.index: replace(c, seconds=0.0) for c in record.counted}


@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
def test_two_devices_certify_as_one(procedure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = make_plans(defenses="none", dataset=TINY, procedure=procedure, n=1000)
    threads: set[int] = set()
    drawn = certify.vote

    def vote(*args: object) -> object:
        threads.add(threading.get_ident())
        return drawn(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(certify, "vote", vote)
    alone = run.Session(CPU, tmp_path / "one", ConsoleReporter()).run(plan)
    assert threads == {threading.get_ident()}
    threads.clear()
    together = run.Session(CPU, tmp_path / "two", ConsoleReporter(), devices=[CPU, CPU]).run(plan)
    assert len(threads) == 2 and threading.get_ident() not in threads
    assert together.path.name == alone.path.name
    assert certificates(together) == certificates(alone)


def test_what_one_device_raises_stops_the_run() -> None:
    def broken(x: Tensor, draw: Draw) -> Tensor:
        raise BenchError("the second device is broken")

    noise, shape = Noise(0, "test"), (1, 4, 4)
    images = np.zeros((30, *shape), np.float32)
    task = certify.Task(lambda i: images[i], lambda i: 0, add_float(noise, 0.5), shape, 3, 0.5, noise, 64, CPU)
    fixed = Fixed(20, 2000, 0.001)
    found = certify.certify(
        lambda x, d: x.flatten(1)[:, :3], task, lambda y: fixed.certify(0.5, y), range(30), [(broken, task)]
    )
    with pytest.raises(BenchError, match="second device"):
        list(found)


def test_a_copy_asks_the_copy_of_its_base(tmp_path: Path) -> None:
    """What a defense sees of its base goes along when both are copied, and holds no more than before."""
    (plan,) = make_plans(defenses="none", dataset=TINY)
    _, certifier = run.Session(CPU, tmp_path, ConsoleReporter()).ready(plan)
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
