"""The size of compute blocks: found before the first vote, and the same for all votes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.errors import DefenseFault
from bench.smoothing.task import Model, Task
from bench.smoothing.votes import TILE


def check_logits(model: Model, task: Task, index: int, number: int = 0) -> Tensor:
    """Compute the logits of a block of an image's votes that decide nothing; ``number`` fixes the votes."""
    return task.logits(model, task.image(index), task.rows("check", index, number * task.block))


def block_sizes(block: int) -> Iterator[int]:
    """Yield ``block`` and its halves, as long as they are whole tiles."""
    while block >= TILE and block % TILE == 0:
        yield block
        block //= 2


def fitting_block(model: Model, task: Task, index: int) -> Task:
    """Return the task with the largest block, up to its own, that fits into memory.

    Raises DefenseFault if even the smallest does not fit, and any other error of the model.
    """
    for rows in block_sizes(task.block):
        tried = replace(task, block=rows)
        try:
            check_logits(model, tried, index)
            return tried
        except Exception as e:
            if not out_of_memory(e):
                raise
        if task.device.type == "cuda":
            torch.cuda.empty_cache()  # only here does the error no longer keep the tensors of its frames
    raise DefenseFault(f"out of memory on {task.device.type} even in blocks of {rows} rows; free memory there")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error or its cause means that the device is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The allocators of CPUs and Apple's GPUs raise plain RuntimeErrors.
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
    if isinstance(error, RuntimeError) and any(w in str(error) for w in words):
        return True
    return error.__cause__ is not None and out_of_memory(error.__cause__)
