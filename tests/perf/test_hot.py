"""The engine's hot paths: ``make perf`` times them, ``make perf-ratio`` compares them with another commit.

Another commit may lack a module that a benchmark imports, so each benchmark has its own imports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROWS, PIXELS = 256, 3 * 32 * 32  # a block of CIFAR-10


@pytest.fixture(autouse=True)
def measured(benchmark: Any) -> None:
    """Record which ``bench`` was measured, for comparisons of two."""
    import bench

    benchmark.extra_info["bench"] = bench.__file__


def votes(rows: int) -> list[Any]:
    from bench.smoothing.noise import Vote

    return [Vote("estimate", 7, i) for i in range(rows)]


def test_float_noise(benchmark: Any) -> None:
    from bench.smoothing.noise import Noise

    keys, noise = votes(ROWS), Noise(0, "test")
    assert benchmark(noise.normals, keys, PIXELS).shape == (ROWS, PIXELS)


def test_grid_noise(benchmark: Any) -> None:
    from bench.smoothing.gridnoise import GridNoise
    from bench.smoothing.noise import Noise

    keys, noise = votes(ROWS), GridNoise(Noise(0, "test"), 0.25, 256)
    assert benchmark(noise.draw, keys, PIXELS).shape == (ROWS, PIXELS)


def test_bound_and_radius(benchmark: Any) -> None:
    from bench.smoothing.fixed import Fixed

    fixed = Fixed(100, 10_000, 0.001)

    def bounds() -> float:
        return sum(fixed.recompute(0.25, 10_000, top, 1e-9)[1] for top in range(5_000, 10_000, 50))

    assert benchmark(bounds) > 0


def _certify(benchmark: Any, shape: tuple[int, int, int], model: Any, noisy: Any, images: int, n: int) -> None:
    from bench.smoothing.engine import Device, certify
    from bench.smoothing.fixed import Fixed
    from bench.smoothing.noise import Noise
    from bench.smoothing.task import Task

    noise, fixed, pixels = Noise(0, "test"), Fixed(100, n, 0.001), np.zeros((images, *shape), np.uint8)
    task = Task(lambda i: pixels[i], lambda i: 0, noisy, shape, 10, 0.25, noise, ROWS, torch.device("cpu"))

    def run() -> int:
        with torch.inference_mode():
            return len(list(certify([Device(task, [model])], lambda label: fixed.certify(0.25, label), range(images))))

    assert benchmark(run) == images


def test_packing(benchmark: Any) -> None:
    """The engine without noise and model: the votes of twenty images are packed into blocks and counted."""
    logits = torch.zeros(ROWS, 10)
    _certify(benchmark, (1, 1, 1), lambda x, draw: logits, lambda images, rows: images[rows.at], images=20, n=1_000)


def test_certify(benchmark: Any) -> None:
    """Two images of CIFAR-10's shape with grid noise and a small convnet."""
    from bench.smoothing.gridnoise import GridNoise
    from bench.smoothing.noise import Noise

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(3600, 10)]
    model = torch.nn.Sequential(*layers).eval()
    noisy = GridNoise(Noise(0, "test"), 0.25, 256).inputs
    _certify(benchmark, (3, 32, 32), lambda x, draw: model(x), noisy, images=2, n=412)


def test_reading_certificates(benchmark: Any, tmp_path: Path) -> None:
    from bench.records.record import read_run
    from tests.helpers.records import begun

    line = {"label": 1, "predicted": 1, "radius": 0.1, "n0": 100, "n": 1000, "top_count": 900, "runner_up": 0}
    line |= {"runner_up_count": 100, "p_lower": 0.8, "votes": 1100, "seconds": 0.5}
    (tmp_path / "certificates.jsonl").write_text("".join(json.dumps({"index": i} | line) + "\n" for i in range(5_000)))
    (tmp_path / "run.json").write_text(json.dumps(begun(5_000).as_json()))
    assert len(benchmark(read_run, tmp_path).certificates) == 5_000
