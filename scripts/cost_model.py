"""Predict the cost of certification from votes, operations a vote and a device's speed; check it on this machine.

    python scripts/cost_model.py [--flops 1e14,4e14] [--gpus 1,8] [--rounds N]

The model: seconds = votes x (seconds of noise a vote + FLOPs a vote / achieved FLOP/s) / cores, where noise is
a + b x pixels. A GPU makes grid noise itself (scripts/gpu_check.py measures it); float noise comes from several
threads of the host, so there the larger of the two terms counts. a, b and FLOP/s are measured on single blocks of
votes; they then predict whole runs of the engine, with the FLOP/s of the same and of another architecture. FLOPs are
those of torch's counter, two for each multiply-add. Seconds are processor time on one thread, so other processes do
not count.

``--flops``: FLOP/s that a GPU achieves on a ViT-B/16, an assumption of the second table.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import timm
import torch
from networks import resnet20
from tabulate import tabulate
from torch import Tensor, nn

from bench.data.datasets import load_card
from bench.interface import Draw
from bench.models.arithmetic import deterministic
from bench.models.load import untrained_base
from bench.process.console import duration
from bench.process.environment import keep_freed_memory
from bench.runs.costs import cost_per_vote
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise, Vote
from bench.smoothing.task import Task, block_rows
from bench.smoothing.votes import TILE

CPU = torch.device("cpu")
SIGMA, ALPHA, N0 = 0.25, 0.001, 100
IMAGENET_VALIDATION = 50_000  # images
OTHER = "cifar10 ViT"
THREADS = 8  # that draw noise for a GPU, each on a core of its own
SIZES = ((2, 1000), (4, 400), (3, 2000))  # images and n of the runs predicted


@dataclass(frozen=True)
class Subject:
    """An architecture with random weights and random images: neither changes the cost of a vote."""

    name: str
    net: nn.Module
    shape: tuple[int, int, int]
    levels: int

    @cached_property
    def task(self) -> Task:
        """Certify random images with grid noise."""
        noise = Noise(0, "test")
        pixels = np.random.default_rng(0).integers(0, self.levels, (4, *self.shape)).astype(np.uint8)
        noisy = GridNoise(noise, SIGMA, self.levels).inputs
        rows = block_rows(self.shape, CPU)
        return Task(lambda i: pixels[i], lambda i: 0, noisy, self.shape, 10, SIGMA, noise, rows, CPU)

    @property
    def pixels(self) -> int:
        """Count the noise values of a vote."""
        return int(np.prod(self.shape))

    def model(self, x: Tensor, draw: Draw) -> Tensor:
        """Compute logits."""
        out: Tensor = self.net(x)
        return out

    @cached_property
    def flops(self) -> float:
        """Count the operations of a vote, as records do."""
        found = cost_per_vote(self.model, self.task, 0).flops
        assert found
        return found

    def block(self) -> tuple[float, float]:
        """Time the noise and the forward pass of one block, in seconds."""
        image, rows = self.task.image(0), self.task.rows("check", 0)
        began = time.process_time()
        x = self.task.noisy(image, rows)
        drawn = time.process_time()
        self.net(x)
        return drawn - began, time.process_time() - drawn

    def draw_floats(self, votes: int) -> float:
        """Time the float noise of ``votes`` votes, in seconds."""
        began = time.process_time()
        Noise(0, "test").normals([Vote("check", 0, i) for i in range(votes)], self.pixels)
        return time.process_time() - began

    def run(self, images: int, n: int) -> float:
        """Time the certification of ``images`` images, in seconds."""
        fixed = Fixed(N0, n, ALPHA)
        began = time.process_time()
        found = list(
            certify([Device(self.task, [self.model])], lambda label: fixed.certify(SIGMA, label), range(images))
        )
        assert len(found) == images
        return time.process_time() - began


def subjects() -> Iterator[Subject]:
    """Make the architectures to compare."""
    for name in ("digits", "cifar10"):
        card = load_card(name)
        base = untrained_base(card, "vit", CPU)
        yield Subject(f"{name} ViT", base.module, card.shape, card.levels)
    yield Subject("ResNet-20 size", resnet20(), (3, 32, 32), 256)


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds."""

    noise: float  # seconds a vote
    speed: float  # FLOP/s achieved
    runs: list[float]  # seconds, in the order of SIZES


def measure(found: list[Subject], rounds: int) -> dict[str, Timing]:
    """Time everything in turn, round after round, since this machine may be shared."""
    blocks: dict[str, list[tuple[float, float]]] = {s.name: [] for s in found}
    runs: dict[str, list[list[float]]] = {s.name: [] for s in found}
    for s in found:
        s.block()  # warms up
    for _ in range(rounds):
        for s in found:
            several = [s.block() for _ in range(3)]
            blocks[s.name].append((statistics.median(a for a, _ in several), statistics.median(b for _, b in several)))
            runs[s.name].append([s.run(*size) for size in SIZES])
    result = {}
    for s in found:
        noise, forward = (statistics.median(column) for column in zip(*blocks[s.name], strict=True))
        seconds = [statistics.median(column) for column in zip(*runs[s.name], strict=True)]
        result[s.name] = Timing(noise / s.task.block, s.flops * s.task.block / forward, seconds)
    return result


@dataclass(frozen=True)
class Line:
    """Seconds of noise: a constant a vote, and a slope a pixel."""

    vote: float
    pixel: float

    def __call__(self, pixels: int) -> float:
        return self.vote + pixels * self.pixel


def predicted(s: Subject, images: int, n: int, noise: float, speed: float) -> float:
    """Predict the seconds of one process; the last block is computed whole too."""
    votes = -(-images * (N0 + n) // s.task.block) * s.task.block
    return votes * (noise + s.flops / speed)


def line(found: list[Subject], measured: dict[str, Timing]) -> Line:
    """Fit the line through the noise of the smallest and the largest images."""
    small, *_, large = sorted(found, key=lambda s: s.pixels)
    pixel = (measured[large.name].noise - measured[small.name].noise) / (large.pixels - small.pixels)
    return Line(measured[small.name].noise - small.pixels * pixel, pixel)


def check(found: list[Subject], measured: dict[str, Timing], noise: Line) -> list[list[object]]:
    """Compare runs with predictions, by the architecture's own FLOP/s and by those of ``OTHER``."""
    rows: list[list[object]] = []
    for s in found:
        own = measured[s.name]
        for (images, n), took in zip(SIZES, own.runs, strict=True):
            mine, other = (predicted(s, images, n, noise(s.pixels), m.speed) for m in (own, measured[OTHER]))
            row = [s.name, f"{s.flops / 1e9:.4f}", f"{own.speed / 1e9:.1f}", images, n, f"{took:.2f}", f"{mine:.2f}"]
            rows.append([*row, *(f"{100 * (p / took - 1):+.0f}%" for p in (mine, other))])
    return rows


def imagenet(speeds: list[float], gpus: list[int]) -> tuple[str, list[list[object]]]:
    """Predict the hours of one defense at the paper's settings with a ViT-B/16, for given speeds."""
    card = load_card("imagenet")
    paper, meta = card.presets["paper"], torch.device("meta")
    images = IMAGENET_VALIDATION // int(str(paper.examples).removeprefix("every:"))
    votes = images * (paper.n0 + paper.n)
    vit = Subject("ViT-B/16", timm.create_model("vit_base_patch16_224").to(meta), card.shape, card.levels)
    shape = (vit.task.block, *vit.shape)
    task = replace(vit.task, device=meta, noisy=lambda images, rows: torch.empty(shape, device=meta))
    found = cost_per_vote(vit.model, task, 0).flops
    assert found
    noise = statistics.median(vit.draw_floats(TILE) for _ in range(9)) / TILE
    summary = (
        f"{images} images x {paper.n0 + paper.n:,} votes = {votes:,} votes of {found / 1e9:.2f} GFLOPs "
        f"= {votes * found:.3g} FLOPs; float noise for {vit.pixels:,} pixels a vote: {noise * 1e3:.2f} ms here"
    )
    rows: list[list[object]] = []
    for speed, count in itertools.product(speeds, gpus):
        drawn, computed = votes * noise / count, votes * found / speed / count
        shared = drawn / THREADS
        rows.append([f"{speed:.3g}", count, *map(duration, (computed, drawn, shared, max(shared, computed)))])
    return summary, rows


def main() -> None:
    """Print both tables as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", default="1e14,4e14")
    parser.add_argument("--gpus", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with deterministic(), torch.inference_mode():
        found = list(subjects())
        measured = measure(found, given.rounds)
        noise = line(found, measured)
        summary, rows = imagenet([float(v) for v in given.flops.split(",")], [int(v) for v in given.gpus.split(",")])
    head = ["model", "GFLOPs / vote", "GFLOP/s", "images", "n", "took (s)", "predicted (s)", "error"]
    print(f"noise: {noise.vote * 1e6:.1f} us a vote and {noise.pixel * 1e9:.1f} ns a pixel\n")
    head.append(f"error at the GFLOP/s of the {OTHER}")
    print(tabulate(check(found, measured, noise), head, "github", disable_numparse=True))
    print(f"\n{summary}\n")
    head = [
        "FLOP/s of a GPU (assumed)",
        "GPUs",
        "forward passes",
        "float noise, 1 thread",
        f"{THREADS} threads",
        "total with float noise",
    ]
    print(tabulate(rows, head, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
