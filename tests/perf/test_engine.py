"""The engine's overhead: certification compared with bare forward passes of the same model, votes and block shape.

Run by ``make perf``, not part of the test suite. The two alternate, and the ratio of the paired medians is printed,
because seconds alone mean little on a shared machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import cifar_vit, resnet20
from torch import Tensor, nn

from bench.data.datasets import load_card
from bench.interface import Draw
from bench.models.arithmetic import deterministic
from bench.models.load import untrained_base
from bench.process.environment import keep_freed_memory
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise, Vote, VoteDraw
from bench.smoothing.rows import add_float
from bench.smoothing.task import Model, Task, block_rows
from bench.smoothing.threads import side_by_side
from tests.helpers.turns import paired, seconds

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")
IMAGES, N0, N = 1, 64, 192  # whole blocks, so that both do the same number of forward passes
FIXED = Fixed(N0, N, 0.001)


@pytest.fixture(autouse=True, scope="module")
def as_in_a_run() -> None:
    keep_freed_memory()


def network_of(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a network with random weights and the shape of its images."""
    if name == "digits ViT":
        card = load_card("digits")
        return untrained_base(card, "vit", CPU).module, card.shape
    return {"ResNet-20 size": resnet20, "CIFAR ViT": cifar_vit}[name](), SHAPE


def task_of(kind: str, images: int, shape: tuple[int, int, int] = SHAPE) -> tuple[Task, Tensor]:
    """Return a task of random images with float or grid noise, or with none, and a block without noise."""
    pixels = np.random.default_rng(0).random((images, *shape), np.float32)
    given = (255 * pixels).astype(np.uint8) if kind == "grid" else pixels
    noise, rows = Noise(0, "test"), block_rows(shape, CPU)
    noisy = {
        "float": add_float(noise, 0.25),
        "grid": GridNoise(noise, 0.25, 256).inputs,
        "no": lambda images, rows: images[rows.at],
    }[kind]
    task = Task(lambda i: given[i], lambda i: 0, noisy, shape, 10, 0.25, noise, rows, CPU)
    return task, torch.from_numpy(np.resize(pixels, (rows, *shape)))


def subject(kind: str, images: int, network: str = "ResNet-20 size") -> tuple[Model, Task, Tensor]:
    """Return a network with random weights, a task with that noise, and a block without noise."""
    net, shape = network_of(network)

    def model(x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = net(x)
        return out

    return model, *task_of(kind, images, shape)


def run(device: Device, images: int) -> None:
    with torch.inference_mode():
        assert len(list(certify([device], lambda label: FIXED.certify(0.25, label), range(images)))) == images


def show(capsys: pytest.CaptureFixture[str], what: str, ratios: list[float]) -> float:
    ratio = statistics.median(ratios)
    with capsys.disabled():
        print(f"\n{what}: median {ratio:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    return ratio


@pytest.mark.parametrize("kind", ["float", "grid"])
@pytest.mark.parametrize("network", ["ResNet-20 size", "CIFAR ViT"])
def test_engine_over_bare_forwards(benchmark: Any, capsys: pytest.CaptureFixture[str], network: str, kind: str) -> None:
    """The overhead in one thread is at most 3%."""
    model, task, batch = subject(kind, IMAGES, network)
    unused = VoteDraw(task.noise, [], task.sigma, CPU)  # this model draws nothing

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(IMAGES * (N0 + N) // task.block):
                model(batch, unused)

    assert IMAGES * (N0 + N) % task.block == 0
    with deterministic():
        ratios = paired(lambda: run(Device(task, [model]), IMAGES), bare, 21)
        benchmark.pedantic(lambda: run(Device(task, [model]), IMAGES), rounds=3)
    what = f"{network}, {kind} noise: engine / bare forwards"
    benchmark.extra_info["ratio"] = ratio = show(capsys, what, ratios)
    assert ratio <= 1.03


@pytest.mark.parametrize("kind", ["no", "float", "grid"])
def test_engine_without_model(benchmark: Any, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Microseconds of a vote for images of 32 x 32 in one thread, and of its noise alone; the logits are constant."""
    task, _ = task_of(kind, images := 8)
    logits = torch.zeros(task.block, task.classes)
    rows, pixels = task.rows("estimate", 0), task.image(0)
    fixed = Fixed(64, 1472, 0.001)  # whole blocks

    def engine() -> None:
        with torch.inference_mode():
            found = certify([Device(task, [lambda x, draw: logits])], lambda y: fixed.certify(0.25, y), range(images))
            assert len(list(found)) == images

    def noise() -> None:
        with torch.inference_mode():
            for _ in range(images * 1536 // task.block):
                task.noisy(pixels, rows)

    assert 1536 % task.block == 0
    with deterministic():
        engine(), noise()
        taken = [(seconds(engine), seconds(noise)) for _ in range(15)]
        benchmark.pedantic(engine, rounds=3)
    whole, alone = (1e6 * statistics.median(side) / (images * 1536) for side in zip(*taken, strict=True))
    ratio = statistics.median(a / b for a, b in taken)
    benchmark.extra_info.update(microseconds=whole, noise=alone, ratio=ratio)
    with capsys.disabled():
        print(f"\n{kind} noise, no model: {whole:.2f} us a vote, the noise alone {alone:.2f} us, ratio {ratio:.2f}")


@pytest.mark.parametrize("network", ["ResNet-20 size", "CIFAR ViT", "digits ViT"])
def test_a_block_in_each_thread(benchmark: Any, capsys: pytest.CaptureFixture[str], network: str) -> None:
    """Ratio of seconds for the same votes: threads that share each block over a block in each thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        pytest.skip("one core")
    model, task, _ = subject("grid", images := 32 if network == "digits ViT" else 12, network)

    def each() -> None:
        with deterministic():
            run(Device(task, [model] * threads), images)

    ratios = paired(lambda: run(Device(task, [model]), images), each, 7)
    benchmark.pedantic(each, rounds=3)
    benchmark.extra_info["ratio"] = show(
        capsys, f"{network}, {threads} threads on each block / on a block each", ratios
    )


def test_noise_in_each_thread(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratio of seconds for grid noise of 224 x 224 images: one thread over several."""
    threads = torch.get_num_threads()
    if threads == 1:
        pytest.skip("one core")
    grid = GridNoise(Noise(0, "test"), 0.25, 256)

    def draw(blocks: range, _: threading.Event) -> None:
        for i in blocks:
            grid.draw([Vote("estimate", i, k) for k in range(16)], 3 * 224 * 224)

    def each() -> None:
        side_by_side([partial(draw, range(i, 8 * threads, threads)) for i in range(threads)])

    ratios = paired(lambda: draw(range(8 * threads), threading.Event()), each, 7)
    benchmark.pedantic(each, rounds=3)
    benchmark.extra_info["ratio"] = show(capsys, f"noise in one thread / in {threads}", ratios)


def test_freed_memory_is_kept(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratio of seconds for the same votes: freed memory returned to the system over kept."""
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; import test_engine as e\n"
        "from bench.process import environment\n"
        "if sys.argv[1] == 'keep': environment.keep_freed_memory()\n"
        "model, task, _ = e.subject('grid', 4); device = e.Device(task, [model])\n"
        "with e.deterministic(): e.run(device, 4); began = time.process_time(); e.run(device, 4)\n"
        "print(time.process_time() - began)"
    )
    here, root = Path(__file__).parent, Path(__file__).parents[2]

    def taken(what: str) -> float:
        command = [sys.executable, "-c", code, what, *map(str, (here, root, root / "scripts"))]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ratios = [taken("give back") / taken("keep") for _ in range(3)]
    benchmark.extra_info["ratio"] = show(capsys, "freed memory given back / kept", ratios)
    benchmark.pedantic(lambda: taken("keep"), rounds=1)
