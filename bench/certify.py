"""The certification engine: noise -> votes -> bound -> radius, one for all defenses.

The scheduler says which votes to draw; they are drawn here, in blocks of one fixed shape, on one
device or on several. The engine knows nothing of defenses or records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.dispatch import Dispatcher
from bench.errors import DefenseFault
from bench.interface import Draw
from bench.noise import Noise, Vote, VoteDraw
from bench.procedures import Procedure
from bench.scheduler import TILE, Batch, Certificate, Scheduler, Voted

__all__ = ["TILE", "Certificate", "Model", "Task", "block_rows", "certify", "check_rows", "vote"]

Model = Callable[[Tensor, Draw], Tensor]
Noisy = Callable[[Tensor, Sequence[Vote]], Tensor]  # images and their votes -> float32 noisy pixels, unclipped


@dataclass(frozen=True)
class Task:
    """What is certified: images by index, their labels and noise, and the shape of the compute block."""

    images: Callable[[list[int]], NDArray[Any]]  # indices -> [len, C, H, W], as ``noisy`` takes them
    labels: Callable[[int], int]
    noisy: Noisy
    shape: tuple[int, int, int]
    classes: int
    sigma: float
    noise: Noise  # for what a defense draws itself
    block: int
    device: torch.device

    def repeated(self, index: int) -> Tensor:
        """One image in every row of a block."""
        image = torch.from_numpy(self.images([index])).to(self.device)
        return image.expand(self.block, *self.shape).contiguous()


def block_rows(shape: tuple[int, int, int], device: torch.device) -> int:
    """Rows of a compute block: about a cache's worth of pixels on a CPU, enough to fill an accelerator."""
    budget, most = (2**18, 256) if device.type == "cpu" else (2**24, 1024)
    rows = min(most, budget // int(np.prod(shape)))
    return int(max(TILE, 2 ** int(np.log2(max(rows, 1)))))


class Pixels(dict[int, NDArray[Any]]):
    """Images under way, each read once: indices -> [C, H, W], as the task gives them."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task

    def __missing__(self, index: int) -> NDArray[Any]:
        image: NDArray[Any] = self._task.images([index])[0]
        self[index] = image
        return image


def vote(model: Model, task: Task, batch: Batch, pixels: Mapping[int, NDArray[Any]]) -> Voted:
    """The class that each row of a batch is for, ``task.classes`` where its logits hold a NaN: [batch.rows].

    Drawn in blocks of ``task.block`` rows, the last filled up with copies of its first row, whose votes nobody counts.
    """
    keys = [Vote(s.purpose, s.image, s.first + i) for s in batch.spans for i in range(s.rows)]
    images = torch.from_numpy(np.stack([pixels[s.image] for s in batch.spans])).to(task.device)
    at = np.repeat(np.arange(len(batch.spans)), [s.rows for s in batch.spans])
    voted = np.empty(len(keys), np.int64)
    for begin in range(0, len(keys), task.block):
        block, rows = keys[begin : begin + task.block], at[begin : begin + task.block]
        used = len(block)
        block += block[:1] * (task.block - used)
        rows = np.append(rows, np.repeat(rows[:1], task.block - used))
        x = task.noisy(images[torch.from_numpy(rows).to(task.device)], block)
        logits = model(x, VoteDraw(task.noise, block, task.sigma, task.device))
        classes = torch.where(logits.isnan().any(1), task.classes, logits.argmax(1))
        voted[begin : begin + used] = classes.cpu().numpy()[:used]
    return voted


def certify(
    model: Model,
    task: Task,
    start: Callable[[int], Procedure],
    indices: Iterable[int],
    others: Sequence[tuple[Model, Task]] = (),
) -> Iterator[Certificate]:
    """Certify the images in about their order; yields each as soon as it is decided.

    ``start(label)`` makes the procedure of one image. Memory depends on the block alone, not on the
    votes or the number of images. Counts depend on (identity, image) alone, whatever the order,
    subset or packing. ``others`` are the same model and task on further devices, which share the work.
    """
    if task.block % TILE:
        raise ValueError(f"block must be a multiple of {TILE}, not {task.block}")
    scheduler = Scheduler(start, task.labels, task.classes, indices)
    if others:
        return _on_several([(model, task), *others], scheduler)
    return _on_one(model, task, scheduler)


def _on_one(model: Model, task: Task, scheduler: Scheduler) -> Iterator[Certificate]:
    pixels = Pixels(task)
    while not scheduler.done:
        began = time.perf_counter()
        batch = scheduler.next(task.block)
        assert batch is not None  # with nothing out, an image that is not decided misses votes
        voted = vote(model, task, batch, pixels)
        for certificate in scheduler.take(batch.number, voted, time.perf_counter() - began):
            del pixels[certificate.index]
            yield certificate


class _Thread:
    """A thread that draws votes on a device of its own; satisfies ``dispatch.Worker``."""

    def __init__(self, model: Model, task: Task, pixels: Pixels, back: SimpleQueue[tuple[_Thread, int, Future[Any]]]):
        self._model, self._task, self._pixels, self._back = model, task, pixels, back
        self.pool = ThreadPoolExecutor(1)

    def send(self, run: int, batch: Batch) -> None:
        held = {s.image: self._pixels[s.image] for s in batch.spans}  # read here: this is the caller's thread
        future = self.pool.submit(self._draw, batch, held)
        future.add_done_callback(lambda f: self._back.put((self, batch.number, f)))

    def _draw(self, batch: Batch, held: Mapping[int, NDArray[Any]]) -> tuple[Voted, float]:
        began = time.perf_counter()
        with torch.inference_mode():
            return vote(self._model, self._task, batch, held), time.perf_counter() - began


def _on_several(replicas: Sequence[tuple[Model, Task]], scheduler: Scheduler) -> Iterator[Certificate]:
    pixels, back = Pixels(replicas[0][1]), SimpleQueue[tuple[_Thread, int, Future[Any]]]()
    threads = [_Thread(model, task, pixels, back) for model, task in replicas]
    dispatcher = Dispatcher()
    dispatcher.open(0, scheduler, replicas[0][1].block)
    for thread in threads:
        dispatcher.join(thread)
    try:
        while not scheduler.done:
            dispatcher.fill()
            thread, number, future = back.get()
            for certificate in dispatcher.answer(thread, 0, number, *future.result()):
                pixels.pop(certificate.index, None)
                yield certificate
    finally:
        for thread in threads:
            thread.pool.shutdown(cancel_futures=True)


def check_rows(model: Model, task: Task, index: int) -> float:
    """Refuse a model whose logits for a row depend on the rest of its block; seconds a block takes.

    A defense that averages over its batch certifies nonsense, because F must be a function of one
    image. One block of votes is computed alone, again, with its other rows replaced, and with its tiles moved.
    Raises DefenseFault saying which of these changed a row's logits.
    """
    votes = [Vote("check", index, i) for i in range(task.block)]
    images = task.repeated(index)

    def run(keys: list[Vote], kept: slice = slice(None)) -> Tensor:
        x = task.noisy(images, keys)
        others = torch.ones(task.block, dtype=torch.bool, device=task.device)
        others[kept] = False
        x[others] = 1 - 3 * x[others].flip(1, 2, 3)
        return model(x, VoteDraw(task.noise, keys, task.sigma, task.device))

    reference = run(votes)
    began = time.perf_counter()
    again = run(votes)
    if not torch.equal(again.nan_to_num(), reference.nan_to_num()):
        raise DefenseFault(
            "the same images with the same draw gave other logits: take all randomness from draw, and keep no state"
        )
    seconds = time.perf_counter() - began
    half = task.block // 2
    for kept in (slice(0, 1), slice(half, half + 1), slice(half, None)):
        if not torch.equal(run(votes, kept)[kept].nan_to_num(), reference[kept].nan_to_num()):
            raise DefenseFault(
                "a row's logits change with the other rows of its batch, so they are no function of one image "
                "(batch statistics in logits?): nothing can be certified"
            )
    moved = run(votes[TILE:] + votes[:TILE])
    if not torch.equal(moved[:-TILE].nan_to_num(), reference[TILE:].nan_to_num()):
        raise DefenseFault("a row's logits change with its place in the batch: counts would depend on the packing")
    return seconds
