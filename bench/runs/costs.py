"""Measure what a run costs: its training, and each of its votes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import note, one_line
from bench.models.base import BlackBox, Classifier
from bench.smoothing.task import Model, Task


@dataclass(frozen=True)
class PerVote:
    """Cost of one vote: floating point operations (torch's counter) and passes through a base or a copy of it."""

    flops: float | None  # None: part of them is a black box's, or torch cannot count them
    base_forwards: float
    classifiers: list[nn.Module]  # those passed through


@dataclass(frozen=True)
class Measured:
    """Cost of certification on one device, measured before the first vote."""

    block_seconds: float  # with every thread at work
    base_forwards: float  # a vote
    flops: float | None  # a vote
    parameters: int | None
    calibration: float | None  # seconds of a fixed workload: the machine's unit of seconds
    nan_rows: int  # of the first block
    rows: int  # votes of a batch that keep the device busy
    at_once: int  # votes that it draws at the same time


@dataclass(frozen=True)
class TrainingCost:
    """Cost of training a defense, as run.json states it."""

    train_seconds: float | None  # None: of weights that the user brought
    queries: int | None  # None: of weights that the user brought
    trainable_nominal: int  # parameters
    trainable_updated: int
    trained_here: int
    trained_elsewhere: int
    step_forwards: int | None  # passes of an image in a training step; None: nothing trained, or by a loss of its own
    step_backwards: int | None


def distinct(modules: list[nn.Module]) -> int:
    """Count the parameters of the modules, shared ones once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def cost_per_vote(model: Model, task: Task, index: int) -> PerVote:
    """Measure one block of votes for an image."""
    passes = 0
    seen: list[nn.Module] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal passes
        if isinstance(module, Classifier | BlackBox):
            passes += len(inputs[0])
            seen.append(module)

    def vote() -> None:
        nonlocal passes
        passes = 0
        seen.clear()
        task.logits(model, task.image(index), task.rows("check", index))

    flops: float | None = None
    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        with _frozen(model), FlopCounterMode(display=False) as counter:
            vote()
        if not any(isinstance(m, BlackBox) for m in seen):
            flops = counter.get_total_flops() / task.block
    except Exception as e:  # a figure in a table must not end a run; an error of the model itself is raised again below
        vote()
        note(f"torch cannot count the operations of a vote ({one_line(e)}); they are left out")
    finally:
        hook.remove()
    return PerVote(flops, passes / task.block, seen)


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """No parameter of ``model`` requires a gradient while the context lasts.

    In inference mode a view of one that does has no gradient function, and torch's counter, which watches
    the backward pass of all that requires a gradient, raises AttributeError where a layer is given that view.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
