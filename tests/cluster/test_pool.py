"""Test how the worker pool reads the resources of a cluster; the cluster is simulated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from bench.cluster import pool
from bench.cluster.pool import WorkerPool
from bench.cluster.worker import Place
from bench.errors import BenchError


class FakeRay:
    """Stand for Ray: report ``nodes``, and count the workers that run."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.running = 0

    def start(self, place: Place) -> SimpleNamespace:
        self.running += 1
        return SimpleNamespace(here=SimpleNamespace(remote=lambda: None))

    def kill(self, handle: Any) -> None:
        self.running -= 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr("ray.remote", lambda **_: lambda _: SimpleNamespace(remote=fake.start))
    monkeypatch.setattr("ray.kill", fake.kill)
    monkeypatch.setattr("ray.nodes", lambda: fake.nodes)
    return fake


def workers(threads: int, device: str = "cpu") -> WorkerPool:
    def ignore(*_: object) -> None: ...

    return WorkerPool(Place(".", {}, {}, threads, device, 0.0), ignore, ignore, ignore, ignore)


def node(cpus: int, gpus: int = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


def test_workers_fill_the_room_of_each_node(ray: FakeRay) -> None:
    ray.nodes = [node(5), node(3), node(1), node(8, alive=False)]
    found = workers(threads=2)
    found.look(trainings=0)
    assert ray.running == len(found.actors) == 3
    ray.nodes.append(node(4))
    found.look(trainings=0)
    assert ray.running == 5


def test_workers_make_room_for_trainings(ray: FakeRay) -> None:
    ray.nodes = [node(4)]
    found = workers(threads=1)
    found.look(trainings=0)
    found.look(trainings=3)
    assert ray.running == len(found.actors) == 1


def test_each_gpu_has_one_worker(ray: FakeRay) -> None:
    ray.nodes = [node(16, gpus=2), node(1, gpus=4), node(16)]
    found = workers(threads=1, device="cuda")
    found.look(trainings=0)
    assert ray.running == 3


def test_a_worker_with_a_gpu_reserves_its_share_of_the_cores(ray: FakeRay) -> None:
    """Float noise and draws are made on the CPU, in as many threads."""
    ray.nodes = [node(16, gpus=2), node(12, gpus=4), node(64), node(2, gpus=2, alive=False)]
    assert pool.threads_beside_gpus() == 3
    found = workers(pool.threads_beside_gpus(), device="cuda")
    found.look(trainings=0)
    assert ray.running == 6 and found.needs == {"num_cpus": 3, "num_gpus": 1}
    ray.nodes = [node(64, gpus=1)]
    assert pool.threads_beside_gpus() == 8


def test_a_cluster_without_room_is_refused(ray: FakeRay) -> None:
    ray.nodes = [node(2)]
    with pytest.raises(BenchError, match="has room for a worker, which takes 4 cores"):
        workers(threads=4).look(trainings=0)


@pytest.mark.parametrize(
    ("resources", "name", "kind"),
    [({"CPU": 2}, "auto", "cpu"), ({"GPU": 1}, "auto", "cuda"), ({"GPU": 1}, "cpu", "cpu"), ({"CPU": 2}, "cuda", "")],
)
def test_the_device_is_one_of_the_clusters(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, int], name: str, kind: str
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    if kind:
        assert pool.pick_device(name) == torch.device(kind)
    else:
        with pytest.raises(BenchError, match="not on this Ray cluster, which has cpu"):
            pool.pick_device(name)
