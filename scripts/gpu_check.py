"""Check and measure certification on a GPU: at most eight minutes on one card, without network and data.

    python scripts/gpu_check.py [--device cuda] [--seconds 450] [--out gpu.json]

1. Grid noise made on the card equals the CPU's, to the last bit, over hundreds of millions of pixels.
2. Nothing in the engine's hot path waits for the card (torch's sync debug mode raises where something does).
3. Pixels a second of the noise, and what share of a vote of ViT-B/16 they take.
4. The engine over bare forward passes, in turn, for ViT-B/16 at 224 and ResNet-110 at 32, with random weights, in
   float32, tf32, bfloat16 and compiled; and the host's time for a vote.

Prints one table, and writes all figures with the card's name as JSON. Exit code 1 where 1 or 2 fails. On a CPU it runs
a rehearsal, with fewer votes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

from bench.globalstate import fixed_rng
from bench.interface import Draw
from bench.models import (
    architectures,  # noqa: F401 - registers the ResNet-110 with timm
    arithmetic,
)
from bench.models.arithmetic import deterministic
from bench.process import environment
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.gridnoise import GridNoise
from bench.smoothing.noise import Noise
from bench.smoothing.rows import add_float
from bench.smoothing.task import Task, block_rows
from bench.smoothing.votes import TILE, Batch, Span

CPU = torch.device("cpu")
SIGMA, LEVELS, N0 = 0.25, 256, TILE
VIT, TINY, RESNET = "ViT-B/16", "ViT-Ti/16", "ResNet-110"  # the tiny one for a rehearsal
SHAPES = {VIT: (3, 224, 224), TINY: (3, 224, 224), RESNET: (3, 32, 32)}
MODELS = {VIT: "vit_base_patch16_224", TINY: "vit_tiny_patch16_224", RESNET: "resnet110"}
KINDS = ("float32", "tf32", "bfloat16", "compile", "bfloat16,compile")
ROUNDS = 5  # pairs of engine and bare forward passes
IMAGES = 4


class Net(nn.Module):
    """A network of timm with random weights, as a defense."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with fixed_rng(0):
            self.net = timm.create_model(MODELS[name], pretrained=False).eval().requires_grad_(False)

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.net((x - 0.5) / 0.25)
        return out


@dataclass(frozen=True)
class Subject:
    """A model on a device, with a task of random images."""

    name: str
    device: torch.device
    rows: int
    noise: str = "grid"

    def task(self) -> Task:
        shape, noise = SHAPES[self.name], Noise(0, "check")
        pixels = np.random.default_rng(0).integers(0, LEVELS, (16, *shape)).astype(np.uint8)
        given = pixels if self.noise == "grid" else (pixels / 255).astype(np.float32)
        noisy = GridNoise(noise, SIGMA, LEVELS).inputs if self.noise == "grid" else add_float(noise, SIGMA)
        on_cpu = self.noise == "float"
        return Task(lambda i: given[i], lambda i: 0, noisy, shape, 1000, SIGMA, noise, self.rows, self.device, on_cpu)


def waited(device: torch.device) -> None:
    """Wait for all that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time work, to its end on the device."""
    waited(device)
    began = time.perf_counter()
    work()
    waited(device)
    return time.perf_counter() - began


# 1 ----------------------------------------------------------------------------------------------------


def same_noise(device: torch.device, pixels: int) -> dict[str, Any]:
    """Compare noise and noisy pixels of both devices, for several sizes, grids and noise levels."""
    compared, different = 0, 0
    cases = [
        (SHAPES[name], sigma, levels) for name in (VIT, RESNET) for sigma in (0.12, 0.25, 1.0) for levels in (17, 256)
    ]
    for number, (shape, sigma, levels) in enumerate(cases):
        images = torch.from_numpy(np.random.default_rng(number).integers(0, levels, (3, *shape)).astype(np.uint8))
        noise = GridNoise(Noise(number, "check"), sigma, levels)
        rows = max(3, int(pixels / len(cases) / np.prod(shape)))
        for first in range(0, rows, 512):
            spans = [Span("estimate", i, 2**32 - 7 + first, min(512, rows - first) // 3 + 1) for i in range(3)]
            here, there = (noise.inputs(images.to(d), rows_of(spans, d)) for d in (CPU, device))
            different += int((here.view(torch.int32) != there.cpu().view(torch.int32)).sum())
            compared += here.numel()
    return {"compared_pixels": compared, "different_pixels": different}


def rows_of(spans: list[Span], device: torch.device) -> Any:
    """Return the rows of spans whose images are numbered from 0."""
    from bench.smoothing.rows import Rows

    return Rows.of_spans(spans, {s.image: s.image for s in spans}, device)


# 2 ----------------------------------------------------------------------------------------------------


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the card."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_wait(device: torch.device, threads: int) -> dict[str, Any]:
    """Start batches of several images while torch refuses to wait."""
    subject = Subject(RESNET, device, block_rows(SHAPES[RESNET], device))
    task, model = subject.task(), Net(subject.name).to(device)
    placed = Device(task, [model] * threads, in_flight=2)
    images = {i: task.images([i])[0] for i in range(4)}
    batches = [Batch(k, tuple(Span("estimate", i, k * 4096, task.block // 4) for i in images)) for k in range(3)]
    with deterministic(), torch.inference_mode():
        placed.vote(batches[0], images)  # compiles kernels, pins memory
        try:
            with nothing_waits(device):
                waits = [placed.begin(batch, images) for batch in batches]
        except RuntimeError as e:
            return {"waits": str(e).splitlines()[0]}
        return {"waits": None, "votes": int(sum(len(wait()) for wait in waits))}


# 3 ----------------------------------------------------------------------------------------------------


def noise_speed(subject: Subject) -> float:
    """Return pixels a second of noise, summed with images, in blocks of the subject's rows."""
    task = subject.task()
    image, rows = task.image(0), task.rows("estimate", 0)
    task.noisy(image, rows)
    repeats = 1
    while (taken := seconds(partial(repeat, lambda: task.noisy(image, rows), repeats), subject.device)) < 0.3:
        repeats *= 2
    return repeats * subject.rows * int(np.prod(task.shape)) / taken


def repeat(work: Callable[[], object], times: int) -> None:
    """Call ``work`` several times."""
    for _ in range(times):
        work()


# 4 ----------------------------------------------------------------------------------------------------


def over_bare(subject: Subject, words: tuple[str, ...], threads: int, blocks: int) -> dict[str, Any]:
    """Time the engine and bare forward passes of as many votes, in turn."""
    task, device = subject.task(), subject.device
    model = arithmetic.model(Net(subject.name).to(device), words, device)
    fixed = Fixed(N0, task.block * blocks // IMAGES - N0, 0.001)
    in_flight = 2 if device.type == "cuda" else 1
    placed = Device(task, [model] * (threads if device.type == "cuda" else 1), in_flight)
    image, rows = task.image(0), task.rows("estimate", 0)
    votes = IMAGES * (fixed.n + N0)
    host = 0.0

    def engine() -> None:
        nonlocal host
        began = time.process_time()
        found = list(certify([placed], lambda label: fixed.certify(SIGMA, label), range(IMAGES)))
        host = time.process_time() - began
        assert len(found) == IMAGES

    def bare() -> None:
        for _ in range(blocks):
            model(x, task.draw(rows))

    with deterministic(), torch.inference_mode():
        x = task.noisy(image, rows)
        engine()  # compiles
        bare()
        pairs = [(seconds(engine, device), seconds(bare, device)) for _ in range(ROUNDS)]
    ratios = [one / other for one, other in pairs]
    return {
        "model": subject.name,
        "noise": subject.noise,
        "arithmetic": ",".join(words) or "float32",
        "rows": subject.rows,
        "votes": votes,
        "votes_per_second": votes / statistics.median(one for one, _ in pairs),
        "engine_over_bare": statistics.median(other / one for one, other in pairs),
        "from": min(1 / r for r in ratios),
        "to": max(1 / r for r in ratios),
        "host_microseconds_per_vote": 1e6 * host / votes,
    }


def measurements(device: torch.device, threads: int, ends: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of each model, noise and arithmetic, until the time is over."""
    gpu = device.type == "cuda"
    blocks = {VIT: 24, RESNET: 64} if gpu else {TINY: 8, RESNET: 8}
    for words in KINDS:
        for name in blocks:
            for noise in ("grid", "float") if words == "float32" else ("grid",):
                subject = Subject(name, device, block_rows(SHAPES[name], device) if gpu else TILE, noise)
                if time.monotonic() > ends:
                    print(f"no time left for {name}, {noise} noise, {words}", flush=True)
                    continue
                try:
                    arithmetic.check(parsed := arithmetic.parse(words), device)
                    found = over_bare(subject, parsed, threads, blocks[name])
                except Exception as e:  # a figure that is missing must not cost the others
                    print(f"{name}, {noise} noise, {words}: {type(e).__name__}: {str(e).splitlines()[0]}", flush=True)
                    continue
                print(line(found), flush=True)
                yield found


HEADER = f"{'model':11}{'noise':7}{'arithmetic':18}{'rows':>6}{'votes/s':>10}{'bare/engine':>13}{'host us/vote':>14}"


def line(m: dict[str, Any]) -> str:
    """Format one row of the table; bare/engine is the share of the card that the engine uses."""
    return (
        f"{m['model']:11}{m['noise']:7}{m['arithmetic']:18}{m['rows']:6}{m['votes_per_second']:10,.0f}"
        f"{m['engine_over_bare']:13.3f}{m['host_microseconds_per_vote']:14.1f}"
    )


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=450.0, help="after which no measurement is begun")
    parser.add_argument("--threads", type=int, default=2, help="of the host, beside a GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    ends = time.monotonic() + args.seconds
    device = environment.pick_device(args.device)
    gpu = device.type != "cpu"
    environment.keep_freed_memory()
    found: dict[str, Any] = {"environment": environment.describe(device)}
    print(f"on {found['environment']['device']}, {args.threads} host threads", flush=True)

    found["same"] = same_noise(device, 400_000_000 if gpu else 4_000_000)
    same = found["same"]
    print(f"noise here and on the CPU: {same['different_pixels']:,} of {same['compared_pixels']:,} pixels differ")
    found["wait"] = no_wait(device, args.threads if gpu else 1)
    print(f"the hot path waits for the device: {found['wait']['waits'] or 'never'}", flush=True)
    found["noise_pixels_per_second"] = {
        name: noise_speed(Subject(name, device, block_rows(SHAPES[name], device) if gpu else TILE))
        for name in (VIT if gpu else TINY, RESNET)
    }
    for name, speed in found["noise_pixels_per_second"].items():
        print(f"noise for {name}: {speed:.3g} pixels a second", flush=True)
    print(HEADER, flush=True)
    found["engine"] = list(measurements(device, args.threads, ends))
    for m in found["engine"]:
        if m["noise"] == "grid":
            per_vote = float(np.prod(SHAPES[m["model"]])) / found["noise_pixels_per_second"][m["model"]]
            m["noise_share"] = per_vote * m["votes_per_second"]
            print(f"noise is {m['noise_share']:.2%} of a vote of {m['model']} in {m['arithmetic']}")
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(found["same"]["different_pixels"] or found["wait"]["waits"]))


if __name__ == "__main__":
    main()
