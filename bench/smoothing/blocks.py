"""How many votes are computed together: found before the first vote, and the same for all of a run's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.errors import DefenseFault
from bench.smoothing.engine import TILE, Model, Task
from bench.smoothing.noise import Vote, VoteDraw


def check_logits(model: Model, task: Task, index: int, number: int = 0) -> Tensor:
    """Logits of one block of an image's votes that decide nothing, always the same ones for a ``number``."""
    votes = [Vote("check", index, number * task.block + i) for i in range(task.block)]
    return model(task.noisy(task.repeated(index), votes), VoteDraw(task.noise, votes, task.sigma, task.device))


def sizes(block: int) -> Iterator[int]:
    """Rows of a block, from ``block`` down: halves, as long as they are whole tiles."""
    while block >= TILE and block % TILE == 0:
        yield block
        block //= 2


def fitting_block(model: Model, task: Task, index: int) -> Task:
    """The task with the largest block, at most the given one, that the model has memory for.

    Raises DefenseFault where even the smallest does not fit, and whatever else the model raises.
    """
    for rows in sizes(task.block):
        tried = replace(task, block=rows)
        try:
            check_logits(model, tried, index)
            return tried
        except Exception as e:
            if not out_of_memory(e):
                raise
        if task.device.type == "cuda":
            torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of its frames
    raise DefenseFault(f"out of memory on {task.device.type} even in blocks of {rows} rows; free some of it")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was made of, says that the device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The allocators of the CPU and of Apple's GPUs raise no type of their own.
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
    if isinstance(error, RuntimeError) and any(w in str(error) for w in words):
        return True
    return error.__cause__ is not None and out_of_memory(error.__cause__)
