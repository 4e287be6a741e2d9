"""The certification engine: noise -> votes -> bound -> radius, the same for all defenses.

The scheduler chooses which votes to draw. The engine draws them in blocks of one fixed shape, on one or several
devices. It knows nothing of defenses or records.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.smoothing.dispatch import Dispatcher
from bench.smoothing.noise import to_device
from bench.smoothing.rows import Rows
from bench.smoothing.scheduler import Scheduler
from bench.smoothing.task import ImageCache, Model, Task
from bench.smoothing.threads import share_out
from bench.smoothing.votes import TILE, Batch, Certificate, ImageProcedure, Voted

BLOCKS = 4  # of a batch, for each thread of a CPU: the threads wait for one another only at a batch's end
KEPT_IMAGES = 4  # times the images of a batch: open images take turns

OnBatch = Callable[[Batch, Voted], None]


class _OpenImages:
    """Images on a device: those of recent batches stay there, so that an image is copied once while it gets votes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, Tensor] = {}  # in the order of their last use

    def stacked(self, images: Mapping[int, NDArray[Any]]) -> Tensor:
        """Return the images in the given order, [len, C, H, W]."""
        for index, pixels in images.items():
            held = self._held.pop(index, None)
            self._held[index] = to_device(torch.from_numpy(pixels), self._device) if held is None else held
        for index in list(self._held)[: -KEPT_IMAGES * len(images)]:
            del self._held[index]
        return torch.stack([self._held[index] for index in images])


@dataclass(frozen=True)
class Device:
    """A device that draws votes: the task there, and the model once for each thread that computes blocks.

    ``in_flight``: batches that it works on at once, above 1 where it computes while the host goes on.
    """

    task: Task
    models: Sequence[Model]
    in_flight: int = 1
    _images: _OpenImages = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_images", _OpenImages(self.task.device))

    @property
    def at_once(self) -> int:
        """Votes that it draws at the same time."""
        return self.task.block * (len(self.models) if self.in_flight == 1 else 1)

    @property
    def rows(self) -> int:
        """Votes of a batch that is large enough to keep all threads busy."""
        blocks = 1 if len(self.models) == 1 or self.in_flight > 1 else BLOCKS
        return self.task.block * len(self.models) * blocks

    def vote(self, batch: Batch, images: Mapping[int, NDArray[Any]]) -> Voted:
        """Draw a batch: the class that each row votes for, ``task.classes`` if its logits hold NaN, [batch.rows]."""
        return self.begin(batch, images)()

    def begin(self, batch: Batch, images: Mapping[int, NDArray[Any]]) -> Callable[[], Voted]:
        """Start to draw a batch; call the result to wait for its votes (see ``vote``). A CPU draws them at once.

        Computes blocks of ``task.block`` rows. The last one is filled with copies of its first row, which do not count.
        Nothing here waits for a GPU: what a batch needs goes there in one table, and its votes come back in one copy.
        """
        task = self.task
        shown = {span.image: images[span.image] for span in batch.spans}
        pixels = self._images.stacked(shown)
        rows = Rows.of_spans(batch.spans, {index: place for place, index in enumerate(shown)}, task.device)
        voted = torch.empty(len(rows), dtype=_smallest_type(task.classes), device=task.device)

        def draw(model: Model, begin: int) -> None:
            block = rows[begin : begin + task.block]
            logits = task.logits(model, pixels, block.filled(task.block))
            voted[begin : begin + len(block)] = task.classes_of(logits)[: len(block)]

        begins = range(0, len(rows), task.block)
        share_out(self.models[: len(begins)], begins, draw)
        return _on_host(voted)


def _smallest_type(most: int) -> torch.dtype:
    """Return the smallest type of integers that holds 0 to ``most``."""
    return next(t for t in (torch.uint8, torch.int16, torch.int32) if most <= torch.iinfo(t).max)


def _on_host(values: Tensor) -> Callable[[], Voted]:
    """Start to copy integers to host memory; call the result to wait for them."""
    if values.device.type != "cuda":
        return lambda: values.cpu().numpy().astype(np.int64)
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # the host's core is free while it waits
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Voted:
        copied.synchronize()
        return host.numpy().astype(np.int64)

    return wait


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
    images, in_flight = ImageCache(device.task), deque[tuple[Batch, Callable[[], Voted]]]()
    began = time.perf_counter()
    while not scheduler.done:
        while len(in_flight) < device.in_flight:
            batch = scheduler.next_batch(device.rows, speculate=not in_flight, at_once=device.at_once)
            if batch is None:  # all votes that images wait for are in flight
                break
            in_flight.append((batch, device.begin(batch, images.get(s.image for s in batch.spans))))
        batch, wait = in_flight.popleft()
        voted = wait()
        on_batch(batch, voted)
        ended = time.perf_counter()
        for certificate in scheduler.receive(batch.number, voted, ended - began):
            images.drop(certificate.index)
            yield certificate
        began = ended


_Answer = tuple["_DeviceWorker", Batch, Callable[[], Voted] | BaseException]  # what to wait for, or the error


class _DeviceWorker:
    """A thread that has batches drawn on one of several devices; satisfies ``dispatch.Worker``."""

    def __init__(self, device: Device, images: ImageCache, answers: SimpleQueue[_Answer]) -> None:
        self._device, self._images, self._answers = device, images, answers
        self._requests: SimpleQueue[tuple[Batch, Mapping[int, NDArray[Any]]] | None] = SimpleQueue()
        self._free = time.perf_counter()  # since when it has worked on the next answer
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, run: int, batch: Batch) -> None:
        # Images are read in the caller's thread, the only one that uses the cache.
        self._requests.put((batch, self._images.get(s.image for s in batch.spans)))

    def close(self) -> None:
        """End the thread after the batches sent so far."""
        self._requests.put(None)

    def lap(self) -> float:
        """Return the seconds since the previous call: those of one batch."""
        before, self._free = self._free, time.perf_counter()
        return self._free - before

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            answer: Callable[[], Voted] | BaseException
            try:
                answer = self._device.begin(*request)
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
            voted = answer()
            on_batch(batch, voted)
            for certificate in dispatcher.answer(worker, 0, batch.number, voted, worker.lap()):
                images.drop(certificate.index)
                yield certificate
    finally:
        for worker in workers:
            worker.close()
