"""The certification engine: noise -> votes -> bound -> radius, one for all defenses.

Each image is driven by a *procedure*: a generator that asks for votes and, once it has seen
enough, returns the decision. The engine packs the votes that any image still needs into blocks of
one fixed shape and hands the counts back; it knows nothing of defenses or records.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.errors import DefenseFault
from bench.interface import Draw
from bench.noise import Noise, Vote, VoteDraw
from bench.procedures import Decision, Procedure, Votes

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


class _Image:
    """An image under way: its procedure, the votes it waits for, and those drawn ahead."""

    def __init__(self, index: int, label: int, slot: int, procedure: Procedure, classes: int) -> None:
        self.index, self.label, self.slot = index, label, slot
        self.seconds = 0.0
        self._procedure, self._width = procedure, classes + 1  # NaN is a class of its own, the last
        self._given: dict[str, int] = {}  # votes of each purpose that the procedure has seen
        self._expect(next(procedure), np.empty(0, np.int64))

    def _expect(self, wanted: Votes, drawn: NDArray[np.int64]) -> None:
        self.wanted, self._left = wanted, wanted.count
        self._tally = np.zeros(self._width, np.int64)
        self._ahead = drawn[:0]
        self.placed = len(drawn)  # votes drawn since the procedure last saw any
        self.take(drawn)

    @property
    def next_vote(self) -> int:
        """Number of the first vote not yet drawn."""
        return self._given.get(self.wanted.purpose, 0) + self.placed

    @property
    def missing(self) -> int:
        """Votes that the procedure waits for and that are in no block yet."""
        return max(0, self.wanted.count - self.placed)

    @property
    def later(self) -> int:
        """Votes in no block yet that the procedure may ask for, those it waits for included."""
        return self.wanted.count + self.wanted.later - self.placed

    def take(self, voted: NDArray[np.int64]) -> None:
        """Note what its next votes, in order, were for."""
        self._tally += np.bincount(voted[: self._left], minlength=self._width)
        self._ahead = np.concatenate([self._ahead, voted[self._left :]])
        self._left -= min(self._left, len(voted))

    def advance(self) -> Certificate | None:
        """Show the procedure what it waits for while that is drawn: its decision, None when it wants more votes."""
        while not self._left:
            before = self.wanted
            self._given[before.purpose] = self._given.get(before.purpose, 0) + before.count
            try:
                wanted = self._procedure.send(self._tally)
            except StopIteration as stop:
                decision: Decision = stop.value
                return Certificate(**vars(decision), index=self.index, label=self.label, seconds=self.seconds)
            self._expect(wanted, self._ahead[: None if wanted.purpose == before.purpose else 0])
        return None


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
    kind = torch.from_numpy(task.images([])).dtype
    stored = torch.zeros((slots, *task.shape), dtype=kind, device=task.device)
    waiting, free = deque(indices), list(range(slots))
    active: list[_Image] = []
    while waiting or active:
        began = time.perf_counter()
        block = _Block(task.block)
        while block.room:
            image = next((a for a in active if a.missing), None)
            if image is None:
                if not waiting:
                    break
                image = _open(waiting.popleft(), free.pop(), task, start, stored)
                active.append(image)
            block.place(image, image.missing)
        _fill_ahead(block, active)
        block.pad()
        at = torch.tensor(block.slots, device=task.device)
        logits = model(task.noisy(stored[at], block.votes), VoteDraw(task.noise, block.votes, task.sigma, task.device))
        voted = torch.where(logits.isnan().any(1), task.classes, logits.argmax(1)).cpu().numpy()
        spent, used = time.perf_counter() - began, sum(rows.stop - rows.start for _, rows in block.shares)
        for image, rows in block.shares:
            image.take(voted[rows])
            image.seconds += spent * (rows.stop - rows.start) / used
        for image in active.copy():
            certificate = image.advance()
            if certificate is not None:
                active.remove(image)
                free.append(image.slot)
                yield certificate


def _open(index: int, slot: int, task: Task, start: Callable[[int], Procedure], stored: Tensor) -> _Image:
    stored[slot] = torch.from_numpy(task.images([index])[0]).to(task.device)
    label = task.labels(index)
    return _Image(index, label, slot, start(label), task.classes)


class _Block:
    """One block being packed: the vote and image slot of each row, and which rows are whose."""

    def __init__(self, rows: int) -> None:
        self.votes: list[Vote] = []
        self.slots: list[int] = []
        self.shares: list[tuple[_Image, slice]] = []
        self._rows = rows

    @property
    def room(self) -> int:
        """Rows left."""
        return self._rows - len(self.votes)

    def place(self, image: _Image, most: int) -> None:
        """Add as many of the image's next votes as fit, up to ``most``, whole tiles at a time."""
        purpose, first = image.wanted.purpose, image.next_vote
        lead = first % TILE  # only after votes that ended within a tile
        count = min(most, self.room - lead)
        filler = -(lead + count) % TILE
        begin = len(self.votes) + lead
        self.votes += [Vote(purpose, image.index, first + i) for i in range(-lead, count + filler)]
        self.slots += [image.slot] * (lead + count + filler)
        self.shares.append((image, slice(begin, begin + count)))
        image.placed += count

    def pad(self) -> None:
        """Fill the rows left with copies of the first, whose votes nobody counts."""
        self.votes += self.votes[:1] * self.room
        self.slots += self.slots[:1] * (self._rows - len(self.slots))


def _fill_ahead(block: _Block, active: list[_Image]) -> None:
    """Spend rows that would stay empty on votes which images under way may ask for later, shared out evenly."""
    hopeful = [a for a in active if a.later]
    for left, image in zip(range(len(hopeful), 0, -1), hopeful, strict=True):
        if share := block.room // left // TILE * TILE:
            block.place(image, min(share, image.later))


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
