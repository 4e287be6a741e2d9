"""The engine's price: certification against bare forward passes of the same model, votes and block shape.

Run by ``make perf``; never part of the test suite. The two take turns and the ratio of the paired
medians is printed, since seconds alone say little on a shared machine.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from convnets import resnet20
from torch import Tensor
from turns import paired

from bench.certify import Device, Task, block_rows, certify
from bench.gridnoise import GridNoise
from bench.interface import Draw
from bench.noise import Noise, add_float
from bench.procedures import Fixed

SHAPE = (3, 32, 32)
IMAGES, N0, N = 1, 64, 192  # whole blocks, so that both do the same number of forward passes


@pytest.mark.parametrize(("kind", "most"), [("float", 1.03), ("grid", 1.08)])
def test_engine_over_bare_forwards(benchmark: Any, capsys: pytest.CaptureFixture[str], kind: str, most: float) -> None:
    """At most 3% on top with float noise, 8% with grid noise (ResNet-20-size convnet, 2 cores)."""
    model, device = resnet20(), torch.device("cpu")
    pixels = np.random.default_rng(0).random((IMAGES, *SHAPE), np.float32)
    rows = block_rows(SHAPE, device)
    noise = Noise(0, "test")
    noisy = add_float(noise, 0.25) if kind == "float" else GridNoise(noise, 0.25, 256).inputs
    images = pixels if kind == "float" else (255 * pixels).astype(np.uint8)
    task = Task(lambda i: images[i], lambda i: 0, noisy, SHAPE, 10, 0.25, noise, rows, device)
    batch = torch.from_numpy(np.resize(pixels, (rows, *SHAPE)))
    fixed = Fixed(N0, N, 0.001)

    def f(x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = model(x)
        return out

    def engine() -> None:
        with torch.inference_mode():
            assert (
                len(list(certify([Device(task, [f])], lambda label: fixed.certify(0.25, label), range(IMAGES))))
                == IMAGES
            )

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(IMAGES * (N0 + N) // rows):
                model(batch)

    assert IMAGES * (N0 + N) % rows == 0
    ratios = paired(engine, bare, 41)
    ratio = statistics.median(ratios)
    with capsys.disabled():
        print(
            f"\n{kind} noise: engine / bare forwards: median {ratio:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}"
        )
    benchmark.extra_info["ratio"] = ratio
    benchmark.pedantic(engine, rounds=3)
    assert ratio <= most
