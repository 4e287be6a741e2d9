"""The certification engine: noise -> votes -> bound -> radius, one for all defenses.

The scheduler says which votes to draw; they are drawn here, in blocks of one fixed shape, on one
device or on several. The engine knows nothing of defenses or records.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.errors import DefenseFault
from bench.interface import Draw
from bench.smoothing.dispatch import Dispatcher
from bench.smoothing.noise import Noise, Vote, VoteDraw
from bench.smoothing.procedures import Procedure
from bench.smoothing.scheduler import TILE, Batch, Certificate, Scheduler, Voted

__all__ = ["TILE", "Certificate", "Device", "Model", "Task", "block_rows", "certify", "check_rows"]

BLOCKS = 4  # of a batch, for each thread of a device: its threads wait for one another at a batch's end only
RANDOM_HALVES = 2  # of the rows of a block, in the check that no row depends on another
PATIENCE = 5.0  # seconds that threads are given to end their blocks once the run is to end

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


@dataclass(frozen=True)
class Device:
    """Where votes are drawn: the task there, and the model once for each thread that computes blocks."""

    task: Task
    models: Sequence[Model]

    @property
    def at_once(self) -> int:
        """Votes that its threads draw at the same time."""
        return self.task.block * len(self.models)

    @property
    def rows(self) -> int:
        """Votes of a batch that keep it busy for a while."""
        return self.at_once * (1 if len(self.models) == 1 else BLOCKS)

    def vote(self, batch: Batch, pixels: Mapping[int, NDArray[Any]]) -> Voted:
        """The class that each row of a batch is for, ``task.classes`` where its logits hold a NaN: [batch.rows].

        In blocks of ``task.block`` rows, the last filled up with copies of its first row, whose votes nobody counts.
        """
        task = self.task
        keys = [Vote(s.purpose, s.image, s.first + i) for s in batch.spans for i in range(s.rows)]
        images = torch.from_numpy(np.stack([pixels[s.image] for s in batch.spans])).to(task.device)
        at = np.repeat(np.arange(len(batch.spans)), [s.rows for s in batch.spans])
        voted = np.empty(len(keys), np.int64)

        def draw(model: Model, begin: int) -> None:
            block, rows = keys[begin : begin + task.block], at[begin : begin + task.block]
            used = len(block)
            block += block[:1] * (task.block - used)
            rows = np.append(rows, np.repeat(rows[:1], task.block - used))
            x = task.noisy(images[torch.from_numpy(rows).to(task.device)], block)
            logits = model(x, VoteDraw(task.noise, block, task.sigma, task.device))
            classes = torch.where(logits.isnan().any(1), task.classes, logits.argmax(1))
            voted[begin : begin + used] = classes.cpu().numpy()[:used]

        left = iter(range(0, len(keys), task.block))

        def work(model: Model, over: threading.Event) -> None:
            for begin in left:
                if over.is_set():
                    return
                draw(model, begin)

        side_by_side([partial(work, model) for model in self.models[: -(-len(keys) // task.block)]])
        return voted


def side_by_side(jobs: Sequence[Callable[[threading.Event], None]]) -> None:
    """Do each job in a thread of its own (one alone: in this one). Raises what one of them raises.

    A job may look at the event, which is set once another has raised or the process is interrupted.
    """
    raised, over = list[BaseException](), threading.Event()

    def work(job: Callable[[threading.Event], None]) -> None:
        try:
            with torch.inference_mode():
                job(over)
        except BaseException as e:
            raised.append(e)
            over.set()

    if len(jobs) == 1:
        work(jobs[0])
    else:
        # None that the process waits for at its end, since one may hang.
        threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as e:  # Ctrl-C, or the watchdog
            raised.insert(0, e)
            over.set()
            ends = time.monotonic() + PATIENCE
            for thread in threads:
                thread.join(max(0.0, ends - time.monotonic()))
    if raised:
        raise raised[0]


def certify(
    devices: Sequence[Device],
    start: Callable[[int], Procedure],
    indices: Iterable[int],
    seen: Callable[[Batch, Voted], None] = lambda *_: None,
) -> Iterator[Certificate]:
    """Certify the images in about their order; yields each as soon as it is decided.

    ``start(label)`` makes the procedure of one image; ``seen`` is shown every batch of votes that is counted. The
    devices hold the same model and task and share the work. Memory depends on their blocks alone, not on the votes or
    the number of images. Counts depend on (identity, image) alone, whatever the order, subset, packing or number of
    devices and threads.
    """
    task = devices[0].task
    if task.block % TILE:
        raise ValueError(f"block must be a multiple of {TILE}, not {task.block}")
    scheduler = Scheduler(start, task.labels, task.classes, indices)
    return _on_one(devices[0], scheduler, seen) if len(devices) == 1 else _on_several(devices, scheduler, seen)


def _on_one(device: Device, scheduler: Scheduler, seen: Callable[[Batch, Voted], None]) -> Iterator[Certificate]:
    pixels = Pixels(device.task)
    while not scheduler.done:
        began = time.perf_counter()
        batch = scheduler.next(device.rows, at_once=device.at_once)
        assert batch is not None  # with nothing out, an image that is not decided misses votes
        voted = device.vote(batch, pixels)
        seen(batch, voted)
        for certificate in scheduler.take(batch.number, voted, time.perf_counter() - began):
            pixels.pop(certificate.index, None)
            yield certificate


class _Feeder:
    """A thread that has batches drawn on one of several devices; satisfies ``dispatch.Worker``."""

    def __init__(self, device: Device, pixels: Pixels, back: SimpleQueue[tuple[_Feeder, Batch, Any]]) -> None:
        self._device, self._pixels, self._back = device, pixels, back
        self._asked: SimpleQueue[tuple[Batch, Mapping[int, NDArray[Any]]] | None] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, run: int, batch: Batch) -> None:
        # Pixels are read here: this is the caller's thread.
        self._asked.put((batch, {s.image: self._pixels[s.image] for s in batch.spans}))

    def close(self) -> None:
        """Have the thread end after what it was sent."""
        self._asked.put(None)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            began = time.perf_counter()
            try:
                answer: Any = self._device.vote(*asked), time.perf_counter() - began
            except BaseException as e:
                answer = e
            self._back.put((self, asked[0], answer))


def _on_several(
    devices: Sequence[Device], scheduler: Scheduler, seen: Callable[[Batch, Voted], None]
) -> Iterator[Certificate]:
    pixels, back = Pixels(devices[0].task), SimpleQueue[tuple[_Feeder, Batch, Any]]()
    feeders = [_Feeder(device, pixels, back) for device in devices]
    dispatcher = Dispatcher()
    dispatcher.open(0, scheduler, devices[0].rows, devices[0].at_once)
    for feeder in feeders:
        dispatcher.join(feeder)
    try:
        while not scheduler.done:
            dispatcher.fill()
            feeder, batch, answer = back.get()
            if isinstance(answer, BaseException):
                raise answer
            seen(batch, answer[0])
            for certificate in dispatcher.answer(feeder, 0, batch.number, *answer):
                pixels.pop(certificate.index, None)
                yield certificate
    finally:
        for feeder in feeders:
            feeder.close()


def check_rows(model: Model, task: Task, index: int) -> float:
    """Refuse a model whose logits for a row depend on the rest of its block; seconds a block takes.

    A defense that averages over its batch certifies nonsense, because F must be a function of one
    image. One block of votes is computed alone, again, with some of its rows replaced, and with its tiles moved.
    The rows replaced are fixed ones and random halves, drawn at every call, so that no pattern of mixed rows goes
    unnoticed for long. Raises DefenseFault naming which of these changed a row's logits.
    """
    votes = [Vote("check", index, i) for i in range(task.block)]
    images = task.repeated(index)

    def run(keys: list[Vote], kept: Tensor | None = None) -> Tensor:
        x = task.noisy(images, keys)
        others = torch.zeros(task.block, dtype=torch.bool) if kept is None else ~kept
        others = others.to(task.device)
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
    for kept in _kept_rows(task.block):
        if not torch.equal(run(votes, kept)[kept].nan_to_num(), reference[kept].nan_to_num()):
            raise DefenseFault(
                "a row's logits change with the other rows of its batch, so they are no function of one image "
                "(batch statistics in logits?): nothing can be certified"
            )
    moved = run(votes[TILE:] + votes[:TILE])
    if not torch.equal(moved[:-TILE].nan_to_num(), reference[TILE:].nan_to_num()):
        raise DefenseFault("a row's logits change with its place in the batch: counts would depend on the packing")
    return seconds


def _kept_rows(block: int) -> Iterator[Tensor]:
    """Masks of the rows that stay as they are while the others are replaced.

    A random half and its complement separate any two rows with a chance of 1/2, whatever their places.
    """
    row = torch.arange(block)
    yield row == 0
    yield row == block // 2
    yield row >= block // 2
    for _ in range(RANDOM_HALVES):
        half = torch.from_numpy(np.random.default_rng(secrets.randbits(64)).permutation(block) < block // 2)
        yield half
        yield ~half
