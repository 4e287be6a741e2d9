"""How long a vote takes, from as few rows of a block as can tell."""

from __future__ import annotations

import time

from bench.smoothing.blocks import out_of_memory
from bench.smoothing.noise import Vote, VoteDraw
from bench.smoothing.task import Model, Task

PATIENCE = 1.0  # seconds: where a block takes longer, part of it is timed


def vote_seconds(model: Model, task: Task, index: int) -> tuple[float, int]:
    """The seconds of a vote for an image, and of how many rows they were timed: twice as many until it takes long.

    All rows of the block where memory is too small to tell.
    """
    rows, taken = 1, 0.0
    try:
        _seconds(model, task, index, rows)  # the first call makes what later ones find
        while True:
            taken = _seconds(model, task, index, rows)
            if rows == task.block or 2 * taken > PATIENCE:
                return taken / rows, rows
            rows = min(2 * rows, task.block)
    except Exception as e:
        if not out_of_memory(e):
            raise
        return taken / rows, task.block


def _seconds(model: Model, task: Task, index: int, rows: int) -> float:
    votes = [Vote("check", index, i) for i in range(rows)]
    x = task.noisy(task.repeated(index)[:rows], votes)
    began = time.perf_counter()
    model(x, VoteDraw(task.noise, votes, task.sigma, task.device)).sum().item()  # waits for an accelerator
    return time.perf_counter() - began
