"""What Ray costs: votes a second of one and two workers of one core each, against a process of one core.

Run by ``make perf``. Starting Ray and its workers is left out: each way runs with few and with many votes, and
what the difference in votes took is compared. On a machine of two cores the command's own process shares them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Result

pytest.importorskip("ray")

IMAGES, FEW, MANY = 100, 1000, 6000


def test_efficiency_of_one_and_two_workers(
    benchmark: Any,
    capfd: pytest.CaptureFixture[str],
    bench: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from ray.cluster_utils import Cluster

    args = ("run", "--defense", "full", "--dataset", "digits", "--examples", IMAGES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker has as many cores as torch has threads here

    def votes_a_second(name: str, *more: object) -> float:
        taken = []
        for n in (FEW, MANY):
            began = time.perf_counter()
            ran = bench(*args, "--n", n, "--out", tmp_path / name, *more)
            taken.append(time.perf_counter() - began)
            assert ran.code == 0, ran.err
        return IMAGES * (MANY - FEW) / (taken[1] - taken[0])

    def on_ray(workers: int) -> float:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False})
        try:
            return votes_a_second(f"ray-{workers}", "--executor", "ray", "--ray-address", cluster.address)
        finally:
            cluster.shutdown()

    try:
        assert bench(*args, "--n", FEW, "--out", tmp_path / "first").code == 0  # trains, and warms up
        alone = benchmark.pedantic(votes_a_second, args=("local",), rounds=1)
        rates = {workers: on_ray(workers) for workers in (1, 2)}
    finally:
        torch.set_num_threads(threads)
    with capfd.disabled():
        print(f"\none process of one core: {alone:,.0f} votes a second")
        for workers, rate in rates.items():
            print(f"Ray, {workers} workers: {rate:,.0f} votes a second, efficiency {rate / workers / alone:.0%}")
    benchmark.extra_info.update(alone=alone, ray=rates)
    assert rates[1] > 0.5 * alone
