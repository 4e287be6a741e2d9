"""The check that a row's logits depend on that row alone, without which no certificate holds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bench.errors import DefenseFault
from bench.smoothing.rows import Rows
from bench.smoothing.task import Model, Task
from bench.smoothing.votes import TILE

RANDOM_HALVES = 2  # of a block's rows, each tried with its complement


def check_rows(model: Model, task: Task, index: int) -> float:
    """Refuse a model whose logits for a row depend on the rest of its block; return the seconds a block takes.

    F must be a function of one image: a defense that averages over its batch has meaningless certificates. One
    block of votes for the image is computed alone, again, with some of its rows replaced, and with its tiles moved.
    Fixed rows are replaced and random halves, drawn at every call, so that no pattern of mixed rows escapes for long.

    Raises:
        DefenseFault: naming which of these changed a row's logits.
    """
    votes, image = task.rows("check", index), task.image(index)

    def run(rows: Rows, kept: Tensor | None = None) -> Tensor:
        x = task.noisy(image, rows)
        others = torch.zeros(task.block, dtype=torch.bool) if kept is None else ~kept
        others = others.to(task.device)
        x[others] = 1 - 3 * x[others].flip(1, 2, 3)
        return model(x, task.draw(rows))

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
                "a row's logits change with the other rows of its batch, so they are not a function of one image and "
                "nothing can be certified; use no batch statistics in logits"
            )
    moved = run(votes.rolled(TILE))
    if not torch.equal(moved[:-TILE].nan_to_num(), reference[TILE:].nan_to_num()):
        raise DefenseFault(
            "a row's logits change with its place in the batch, so counts would depend on the packing of votes; "
            "compute every row in the same way"
        )
    return seconds


def _kept_rows(block: int) -> Iterator[Tensor]:
    """Yield masks of the rows that are kept while the others are replaced.

    A random half and its complement separate any two rows with a chance of 1/2.
    """
    row = torch.arange(block)
    yield row == 0
    yield row == block // 2
    yield row >= block // 2
    for _ in range(RANDOM_HALVES):
        half = torch.from_numpy(np.random.default_rng(secrets.randbits(64)).permutation(block) < block // 2)
        yield half
        yield ~half
