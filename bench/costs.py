"""What a vote costs, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.base import BlackBox, Classifier
from bench.certify import Model, Task
from bench.noise import Vote, VoteDraw


@dataclass(frozen=True)
class PerVote:
    """What one vote costs: floating point operations (torch's counter) and passes through a base or a copy of it."""

    flops: float | None  # None: part of them is a black box's
    base_forwards: float
    classifiers: list[nn.Module]  # those passed through


def distinct(modules: list[nn.Module]) -> int:
    """Parameters of the modules, those they share counted once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def cost_per_vote(model: Model, task: Task, index: int) -> PerVote:
    """Measure one block of votes for an image."""
    votes = [Vote("check", index, i) for i in range(task.block)]
    passes = 0
    seen: list[nn.Module] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal passes
        if isinstance(module, Classifier | BlackBox):
            passes += len(inputs[0])
            seen.append(module)

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        with FlopCounterMode(display=False) as counter:
            model(task.noisy(task.repeated(index), votes), VoteDraw(task.noise, votes, task.sigma, task.device))
    finally:
        hook.remove()
    opaque = any(isinstance(m, BlackBox) for m in seen)
    flops = None if opaque else counter.get_total_flops() / task.block
    return PerVote(flops, passes / task.block, seen)
