"""The certification engine: noise -> votes -> bound -> radius, one for all defenses.

Each image is driven by a *procedure*: a generator that asks for votes and, once it has seen
enough, returns the decision. The engine packs the votes that any image still needs into blocks of
one fixed shape and hands the counts back; it knows nothing of defenses or records.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.errors import BenchError
from bench.interface import Draw
from bench.noise import Noise, Vote, VoteDraw
from bench.procedures import Counts, Decision, Procedure, Votes

# Votes are placed in tiles: a vote's place within its tile is its number modulo TILE. Matrix kernels
# were measured to give a row other last bits at another alignment, so a freely moving row could
# change its vote with the packing. Sixteen float32 are one cache line, the widest alignment a kernel asks for.
TILE = 16

Model = Callable[[Tensor, Draw], Tensor]
Noisy = Callable[[Tensor, Sequence[Vote]], Tensor]  # images and their votes -> float32 noisy pixels, unclipped


@dataclass(frozen=True)
class Certificate(Decision):
    """One image's line in the record; radius in l2 over pixels of [0, 1]."""

    index: int = -1
    label: int = -1
    seconds: float = 0.0


@dataclass
class _Image:
    """An image under way: its procedure, the votes it waits for, and where their counts gather."""

    index: int
    label: int
    slot: int
    procedure: Procedure
    wanted: Votes
    placed: int = 0  # votes of ``wanted`` already put into a block
    drawn: dict[str, int] = field(default_factory=dict)  # votes of each purpose before ``wanted``
    seconds: float = 0.0


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


def certify(
    model: Model, task: Task, start: Callable[[int], Procedure], indices: Iterable[int]
) -> Iterator[Certificate]:
    """Certify the images in about their order; yields each as soon as it is decided.

    ``start(label)`` makes the procedure of one image. Memory depends on the block alone, not on the
    votes or the number of images. Counts depend on (identity, image) alone, whatever the order,
    subset or packing.
    """
    if task.block % TILE:
        raise ValueError(f"block must be a multiple of {TILE}, not {task.block}")
    slots = task.block // TILE  # an image is opened only when every other has all its votes in this block
    counts = torch.zeros((slots + 1, task.classes + 1), dtype=torch.int64, device=task.device)  # last row: padding
    kind = torch.from_numpy(task.images([])).dtype
    stored = torch.zeros((slots + 1, *task.shape), dtype=kind, device=task.device)
    waiting, free = deque(indices), list(range(slots))
    active: list[_Image] = []
    while waiting or active:
        began = time.perf_counter()
        votes: list[Vote] = []
        rows: list[int] = []
        shares: list[tuple[_Image, int]] = []
        while len(rows) < task.block:
            image = next((a for a in active if a.placed < a.wanted.count), None)
            if image is None:
                if not waiting:
                    break
                image = _open(waiting.popleft(), free.pop(), task, start, stored)
                active.append(image)
            shares.append((image, _place(image, task.block - len(rows), slots, votes, rows)))
        padding = task.block - len(rows)
        votes += [votes[0]] * padding
        rows += [slots] * padding
        at = torch.tensor(rows, device=task.device)
        logits = model(task.noisy(stored[at], votes), VoteDraw(task.noise, votes, task.sigma, task.device))
        _count(logits, at, counts)
        done = [a for a in active if a.placed == a.wanted.count]
        tallies: Sequence[Counts] = list(counts[[a.slot for a in done]].cpu().numpy()) if done else []
        spent, used = time.perf_counter() - began, sum(share for _, share in shares)
        for image, share in shares:
            image.seconds += spent * share / used
        for image, tally in zip(done, tallies, strict=True):
            counts[image.slot] = 0
            certificate = _advance(image, tally)
            if certificate is not None:
                active.remove(image)
                free.append(image.slot)
                yield certificate


def _open(index: int, slot: int, task: Task, start: Callable[[int], Procedure], stored: Tensor) -> _Image:
    stored[slot] = torch.from_numpy(task.images([index])[0]).to(task.device)
    label = task.labels(index)
    procedure = start(label)
    return _Image(index, label, slot, procedure, next(procedure))


def _place(image: _Image, room: int, padding: int, votes: list[Vote], rows: list[int]) -> int:
    """Put as many of the image's wanted votes as fit into the block, whole tiles at a time; how many."""
    wanted = image.wanted
    first = image.drawn.get(wanted.purpose, 0) + image.placed
    lead = first % TILE  # only after a request that ended within a tile
    count = min(wanted.count - image.placed, room - lead)
    filler = -(lead + count) % TILE
    key = Vote(wanted.purpose, image.index, first)
    votes += [key] * lead
    votes += [Vote(wanted.purpose, image.index, first + i) for i in range(count)]
    votes += [key] * filler
    rows += [padding] * lead + [image.slot] * count + [padding] * filler
    image.placed += count
    return count


def _count(logits: Tensor, rows: Tensor, counts: Tensor) -> None:
    """Add each row's vote to its image's counts, on the device; NaN is a class of its own."""
    classes = counts.shape[1] - 1
    voted = torch.where(logits.isnan().any(1), classes, logits.argmax(1))
    counts += torch.bincount(rows * (classes + 1) + voted, minlength=counts.numel()).view_as(counts)


def _advance(image: _Image, tally: Counts) -> Certificate | None:
    """Give the finished request's counts to the procedure: its decision, or None when it wants more votes."""
    image.drawn[image.wanted.purpose] = image.drawn.get(image.wanted.purpose, 0) + image.wanted.count
    try:
        image.wanted, image.placed = image.procedure.send(tally), 0
    except StopIteration as stop:
        decision: Decision = stop.value
        return Certificate(**vars(decision), index=image.index, label=image.label, seconds=image.seconds)
    return None


def check_rows(model: Model, task: Task, index: int) -> float:
    """Refuse a model whose logits for a row depend on the rest of its block; seconds a block takes.

    A defense that averages over its batch certifies nonsense, because F must be a function of one
    image. One block of votes is computed alone, again, with its other rows replaced, and with its tiles moved.
    Raises BenchError saying which of these changed a row's logits.
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
        raise BenchError(
            "the same images with the same draw gave other logits: take all randomness from draw, and keep no state"
        )
    seconds = time.perf_counter() - began
    half = task.block // 2
    for kept in (slice(0, 1), slice(half, half + 1), slice(half, None)):
        if not torch.equal(run(votes, kept)[kept].nan_to_num(), reference[kept].nan_to_num()):
            raise BenchError(
                "a row's logits change with the other rows of its batch, so they are no function of one image "
                "(batch statistics in logits?): nothing can be certified"
            )
    moved = run(votes[TILE:] + votes[:TILE])
    if not torch.equal(moved[:-TILE].nan_to_num(), reference[TILE:].nan_to_num()):
        raise BenchError("a row's logits change with its place in the batch: counts would depend on the packing")
    return seconds
