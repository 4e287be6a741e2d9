"""Simulate how well a cluster is used: the real scheduler and dispatcher, with simulated workers and clock.

    python scripts/cluster_simulation.py [--workers 1000] [--images 500] [--cap 100000]
    python scripts/cluster_simulation.py --messages

A worker takes 30 ms for a block of 64 votes (about a ViT-B/16 on ImageNet in float32 on a large GPU) times a random
factor of mean 1. Efficiency is the time that the votes counted in certificates take at that speed, divided by all
workers' time until the last certificate: waiting, unused speculative votes and duplicates all lower it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

from bench.smoothing.anytime import Anytime
from bench.smoothing.dispatch import Dispatcher, batch_factor
from bench.smoothing.fixed import Fixed
from bench.smoothing.scheduler import Scheduler
from bench.smoothing.votes import Batch, Certificate, Span, Voted

BLOCK, SECONDS, LATENCY = 64, 0.03, 0.002  # votes of a block, seconds for a block, seconds for a message one way
SIGMA, RADII, CLASSES = 0.5, (0.25, 0.5, 0.75, 1.0, 1.5), 2

Factor = Callable[[np.random.Generator], float]
STRAGGLERS: dict[str, Factor] = {
    "none": lambda rng: 1.0,
    "log-normal, s = 1": lambda rng: float(rng.lognormal(-0.5, 1.0)),
    "Pareto, a = 1.5": lambda rng: float((1 + rng.pareto(1.5)) / 3),
}


@dataclass
class Clock:
    """Simulated time and the answers to come, earliest first."""

    now: float = 0.0
    events: list[tuple[float, int, Simulated, int, Batch, float]] = field(default_factory=list)
    count: itertools.count[int] = field(default_factory=itertools.count)


@dataclass(eq=False)
class Simulated:
    """A simulated worker that draws its batches one after the other; satisfies ``dispatch.Worker``."""

    clock: Clock
    factor: Factor
    rng: np.random.Generator
    free: float = 0.0

    def send(self, run: int, batch: Batch) -> None:
        begins = max(self.clock.now + LATENCY, self.free)
        took = -(-batch.rows // BLOCK) * SECONDS * self.factor(self.rng)
        self.free = begins + took
        event = (self.free + LATENCY, next(self.clock.count), self, run, batch, took)
        heapq.heappush(self.clock.events, event)


@dataclass(frozen=True)
class Outcome:
    """Results of one simulated command."""

    efficiency: float
    makespan: float  # seconds
    batches: int
    scheduling: float  # real seconds of scheduler, dispatcher and procedures


def simulate(
    workers: int, images: int, runs: int, procedure: Fixed | Anytime, factor: Factor, death: float = 0.0, seed: int = 0
) -> Outcome:
    """Simulate one command of several runs; ``death``: chance per answer that the worker dies and is replaced."""
    rng = np.random.default_rng(seed)
    p = special.ndtr(rng.normal(1.0, 1.2, (runs, images)))  # each image's probability of its label
    clock, dispatcher = Clock(), Dispatcher()
    rows = batch_factor(workers, SECONDS) * BLOCK
    schedulers = [
        Scheduler(lambda label: procedure.certify(SIGMA, label), lambda i: 0, CLASSES, range(images))
        for _ in range(runs)
    ]
    for number, scheduler in enumerate(schedulers):
        dispatcher.open(number, scheduler, rows)
    for _ in range(workers):
        dispatcher.join(Simulated(clock, factor, rng))
    found: list[Certificate] = []
    scheduling, batches = 0.0, 0
    left = runs
    while left:
        began = time.process_time()
        dispatcher.fill()
        scheduling += time.process_time() - began
        clock.now, _, worker, run, batch, took = heapq.heappop(clock.events)
        if death and rng.random() < death:
            dispatcher.leave(worker)
            dispatcher.join(Simulated(clock, factor, rng))
            continue
        voted: Voted = np.concatenate([(rng.random(s.rows) >= p[run, s.image]).astype(np.int64) for s in batch.spans])
        batches += 1
        began = time.process_time()
        was = schedulers[run].done
        found += dispatcher.answer(worker, run, batch.number, voted, took)
        if schedulers[run].done and not was:
            dispatcher.close(run)
            left -= 1
        scheduling += time.process_time() - began
    assert len(found) == runs * images
    useful = sum(c.votes for c in found) / BLOCK * SECONDS
    return Outcome(useful / (workers * clock.now), clock.now, batches, scheduling)


def messages(count: int = 2000) -> float:
    """Measure this process's seconds per batch of 16 blocks, request and answer, with a real Ray worker."""
    import queue

    import ray

    class Echo:
        def draw(self, run: int, batch: Batch, pixels: dict[int, np.ndarray]) -> tuple[np.ndarray, float]:
            return np.zeros(batch.rows, np.int32), 0.0

    back: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    actor: Any = ray.remote(Echo).remote()
    batch, pixels = Batch(0, (Span("estimate", 0, 0, 16 * BLOCK),)), {0: np.zeros((3, 224, 224), np.uint8)}
    ray.get(actor.draw.remote(0, batch, pixels))
    began = time.process_time()
    for _ in range(count):
        actor.draw.remote(0, batch, pixels).future().add_done_callback(back.put)
    for _ in range(count):
        back.get().result()
    took = time.process_time() - began
    ray.shutdown()
    return took / count


def main() -> None:
    """Print the table of docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--cap", type=int, default=100_000, help="most votes of an image")
    parser.add_argument("--messages", action="store_true", help="measure the cost of Ray's messages instead")
    args = parser.parse_args()
    if args.messages:
        print(f"{1e3 * messages():.2f} ms of this process per Ray request and answer")
        return
    columns = "procedure", "runs", "stragglers", "workers lost", "efficiency", "makespan (s)", "batches", "us a batch"
    print(*columns, sep=" | ")
    procedures: tuple[Fixed | Anytime, ...] = (Fixed(100, args.cap, 0.001), Anytime(100, args.cap, 0.001, RADII))
    for procedure, runs, (name, factor) in itertools.product(procedures, (1, 12), STRAGGLERS.items()):
        for death in (0.0, 0.001) if name == "none" else (0.0,):
            o = simulate(args.workers, args.images, runs, procedure, factor, death)
            cost = f"{1e6 * o.scheduling / o.batches:.0f}"
            numbers = f"{o.efficiency:.1%}", f"{o.makespan:.1f}", f"{o.batches:,}", cost
            print(procedure.kind, runs, name, f"{death:.1%} of answers", *numbers, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
