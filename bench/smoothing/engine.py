"""The certification engine: noise -> votes -> bound -> radius, the same for all defenses.

The scheduler chooses which votes to draw. The engine draws them in blocks of one fixed shape, on one or several
devices. It knows nothing of defenses or records.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.smoothing.dispatch import Dispatcher
from bench.smoothing.noise import Vote, VoteDraw
from bench.smoothing.scheduler import Scheduler
from bench.smoothing.task import ImageCache, Model, Task
from bench.smoothing.threads import share_out
from bench.smoothing.votes import TILE, Batch, Certificate, ImageProcedure, Voted

BLOCKS = 4  # of a batch, for each thread of a device: its threads wait for one another only at a batch's end

OnBatch = Callable[[Batch, Voted], None]


@dataclass(frozen=True)
class Device:
    """A device that draws votes: the task there, and the model once for each thread that computes blocks."""

    task: Task
    models: Sequence[Model]

    @property
    def at_once(self) -> int:
        """Votes that its threads draw at the same time."""
        return self.task.block * len(self.models)

    @property
    def rows(self) -> int:
        """Votes of a batch that is large enough to keep all threads busy."""
        return self.at_once * (1 if len(self.models) == 1 else BLOCKS)

    def vote(self, batch: Batch, images: Mapping[int, NDArray[Any]]) -> Voted:
        """Draw a batch: the class that each row votes for, ``task.classes`` if its logits hold NaN, [batch.rows].

        Computes blocks of ``task.block`` rows. The last one is filled with copies of its first row, which do not count.
        """
        task = self.task
        keys = [Vote(s.purpose, s.image, s.first + i) for s in batch.spans for i in range(s.rows)]
        pixels = torch.from_numpy(np.stack([images[s.image] for s in batch.spans])).to(task.device)
        at = np.repeat(np.arange(len(batch.spans)), [s.rows for s in batch.spans])
        voted = np.empty(len(keys), np.int64)

        def draw(model: Model, begin: int) -> None:
            block, rows = keys[begin : begin + task.block], at[begin : begin + task.block]
            used = len(block)
            block += block[:1] * (task.block - used)
            rows = np.append(rows, np.repeat(rows[:1], task.block - used))
            x = task.noisy(pixels[torch.from_numpy(rows).to(task.device)], block)
            logits = model(x, VoteDraw(task.noise, block, task.sigma, task.device))
            classes = torch.where(logits.isnan().any(1), task.classes, logits.argmax(1))
            voted[begin : begin + used] = classes.cpu().numpy()[:used]

        begins = range(0, len(keys), task.block)
        share_out(self.models[: len(begins)], begins, draw)
        return voted


def certify(
    devices: Sequence[Device],
    start: Callable[[int], ImageProcedure],
    indices: Iterable[int],
    on_batch: OnBatch = lambda *_: None,
) -> Iterator[Certificate]:
    """Certify images in about the given order, and yield each certificate as soon as it is decided.

    Counts depend on (identity, image) alone, whatever the order, subset, packing or number of devices and threads.
    Memory depends on the devices' blocks alone, not on the number of votes or images.

    Args:
        devices: they hold the same model and task, and share the work.
        start: starts the procedure for one image, given its label.
        indices: the images to certify.
        on_batch: called with every batch and its votes.
    """
    task = devices[0].task
    if task.block % TILE:
        raise ValueError(f"block must be a multiple of {TILE}, not {task.block}")
    scheduler = Scheduler(start, task.labels, task.classes, indices)
    if len(devices) == 1:
        return _on_one(devices[0], scheduler, on_batch)
    return _on_several(devices, scheduler, on_batch)


def _on_one(device: Device, scheduler: Scheduler, on_batch: OnBatch) -> Iterator[Certificate]:
    images = ImageCache(device.task)
    while not scheduler.done:
        began = time.perf_counter()
        batch = scheduler.next_batch(device.rows, at_once=device.at_once)
        assert batch is not None  # no batch is in flight, so every undecided image misses votes
        voted = device.vote(batch, images.get(s.image for s in batch.spans))
        on_batch(batch, voted)
        for certificate in scheduler.receive(batch.number, voted, time.perf_counter() - began):
            images.drop(certificate.index)
            yield certificate


_Answer = tuple["_DeviceWorker", Batch, tuple[Voted, float] | BaseException]  # votes and seconds, or why there are none


class _DeviceWorker:
    """A thread that has batches drawn on one of several devices; satisfies ``dispatch.Worker``."""

    def __init__(self, device: Device, images: ImageCache, answers: SimpleQueue[_Answer]) -> None:
        self._device, self._images, self._answers = device, images, answers
        self._requests: SimpleQueue[tuple[Batch, Mapping[int, NDArray[Any]]] | None] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, run: int, batch: Batch) -> None:
        # Images are read in the caller's thread, the only one that uses the cache.
        self._requests.put((batch, self._images.get(s.image for s in batch.spans)))

    def close(self) -> None:
        """End the thread after the batches sent so far."""
        self._requests.put(None)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            answer: tuple[Voted, float] | BaseException
            began = time.perf_counter()
            try:
                answer = self._device.vote(*request), time.perf_counter() - began
            except BaseException as e:
                answer = e
            self._answers.put((self, request[0], answer))


def _on_several(devices: Sequence[Device], scheduler: Scheduler, on_batch: OnBatch) -> Iterator[Certificate]:
    images, answers = ImageCache(devices[0].task), SimpleQueue[_Answer]()
    workers = [_DeviceWorker(device, images, answers) for device in devices]
    dispatcher = Dispatcher()
    dispatcher.open(0, scheduler, devices[0].rows, devices[0].at_once)
    for worker in workers:
        dispatcher.join(worker)
    try:
        while not scheduler.done:
            dispatcher.fill()
            worker, batch, answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            on_batch(batch, answer[0])
            for certificate in dispatcher.answer(worker, 0, batch.number, *answer):
                images.drop(certificate.index)
                yield certificate
    finally:
        for worker in workers:
            worker.close()
