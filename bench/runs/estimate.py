"""Estimate what a run costs (``bench run --dry-run``), by timing the untrained defense on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.data.split import Split
from bench.models import arithmetic
from bench.models.arithmetic import deterministic
from bench.models.load import untrained_base
from bench.models.names import Given
from bench.models.served import is_url
from bench.process import environment
from bench.records.shards import Shard
from bench.runs import fitting
from bench.runs.costs import cost_per_vote
from bench.runs.identity import describe_noise, examples, make_task, run_label, run_name
from bench.runs.plan import Plan
from bench.runs.splits import Splits
from bench.smoothing import blocks
from bench.smoothing.anytime import Anytime
from bench.smoothing.expected import RadiusCost, radius_costs
from bench.smoothing.rowcheck import check_rows
from bench.smoothing.task import Model, Task
from bench.training.objectives import Cost

LONG = 1.0  # seconds: where a block takes longer, part of it is timed


@dataclass(frozen=True)
class Estimate:
    """The expected cost of one run."""

    run: str
    label: str
    seed: int
    images: int
    votes: int
    flops_per_vote: float | None
    timed_rows: int  # of the block
    block: int  # rows
    seconds: float  # of certification
    train_seconds: float
    step_forwards: int | None  # passes of an image in a training step; None: it trains nothing, or by a loss of its own
    step_backwards: int | None
    objective: str  # a remark on its constants
    sigma: float
    at_most: bool  # ``votes`` are the most that may be drawn; the procedure stops earlier where it can
    radii: list[RadiusCost] | None  # what each costs; None: the same votes, since their number is fixed


@dataclass(frozen=True)
class _Timing:
    """What a vote and a pass of training cost in the defense of a plan, and what its training is."""

    schedule: Any
    trains: bool
    flops: float | None
    rows: int  # of the block that were timed
    block: int
    per_vote: float  # seconds
    per_pass: float


class Estimator:
    """Estimates runs of one command: reads each split once, and times once what takes the same time in several runs."""

    def __init__(self, device: torch.device, shard: Shard | None = None, splits: Splits | None = None) -> None:
        """Begin without timings; ``splits``: those that were read already."""
        self._device, self._shard, self._splits = device, shard, splits or Splits()
        self._timings: dict[Any, _Timing] = {}

    def estimate(self, plan: Plan) -> Estimate:
        """Estimate a run, or its shard, without training or certifying anything."""
        arithmetic.check(plan.arithmetic, self._device)
        split = self._splits.certified(plan)
        indices = examples(plan, split)
        if self._shard:
            indices = self._shard.part(indices)
        # The seed, the images and their number change nothing; sigma may, as a diffusion model's steps follow from it.
        given = plan.card.name, plan.preset, plan.base, plan.normalisation, plan.noise, plan.arithmetic, plan.sigma
        key = *given, plan.defense, repr(plan.config)
        if key not in self._timings:
            self._timings[key] = self._time(plan, split, indices[0])
        timing = self._timings[key]
        step = plan.step_cost if timing.trains and not plan.weights else None
        train, validation = (self._splits.usual(plan.card)[name] for name in ("train", "validation"))
        votes = len(indices) * plan.procedure.max_votes
        passes = training_passes(plan, timing.schedule, train, validation) if timing.trains else 0.0
        return Estimate(
            run=run_name(plan),
            label=run_label(plan),
            seed=plan.seed,
            images=len(indices),
            votes=votes,
            flops_per_vote=timing.flops,
            timed_rows=timing.rows,
            block=timing.block,
            seconds=votes * timing.per_vote,
            train_seconds=passes * timing.per_pass,
            step_forwards=step.forwards if step else None,
            step_backwards=step.backwards if step else None,
            objective=plan.training_objective.remark if step else "",
            sigma=plan.sigma,
            at_most=isinstance(plan.procedure, Anytime) or plan.procedure.target == "correct",
            radii=radius_costs(plan.procedure, plan.sigma, describe_noise(plan)["tau"])
            if isinstance(plan.procedure, Anytime)
            else None,
        )

    def _time(self, plan: Plan, split: Split, index: int) -> _Timing:
        """Time the untrained defense on votes for an image of a split."""
        environment.keep_freed_memory()
        at_once = environment.threads(self._device) if self._device.type == "cpu" else 1
        train = self._splits.usual(plan.card)["train"]
        given = Given(normalisation=plan.normalisation)
        base = untrained_base(plan.card, plan.base, self._device, not plan.cls.adapts, given)
        defense = fitting.construct(plan, base, self._device)
        trains = fitting.trains(defense)  # merged, as it certifies, it may have nothing left to train
        task = make_task(plan, split, self._device)
        with deterministic(), torch.inference_mode(), fitting.attribute_errors(plan.defense, "in the estimate"):
            fitting.merge(defense, train, plan, self._device)
            model, whole = arithmetic.model(defense, plan.arithmetic, self._device, base.module), task.block
            seconds, rows = (0.0, whole) if is_url(plan.base) else vote_seconds(model, task, index)
            if rows == whole:
                task = blocks.fitting_block(defense, task, index)
                seconds, rows = check_rows(model, task, index) / task.block, task.block
            per_vote = per_pass = seconds / at_once
            if plan.training_arithmetic == "bfloat16" and seconds:
                rounded = arithmetic.model(defense, ("bfloat16",), self._device, base.module)
                per_pass = vote_seconds(rounded, task, index)[0] / at_once
            # A server's operations cannot be counted, so it is not asked again.
            flops = None if is_url(plan.base) else cost_per_vote(defense, replace(task, block=rows), index).flops
        return _Timing(defense.schedule(), trains, flops, rows, task.block, per_vote, per_pass)


def training_passes(plan: Plan, schedule: Any, train: Split, validation: Split) -> float:
    """Estimate what training costs, candidates of a search included, in passes of an image through the defense."""
    trainings = 0 if plan.weights else max(1, len(plan.candidates))
    images = len(plan.training_images(train.first(plan.card.presets[plan.preset].train_examples), validation))
    step = (plan.step_cost or Cost(1, 1)).passes
    return float(trainings * (step * getattr(schedule, "epochs", 0.0) * images + getattr(plan.config, "queries", 0)))


def vote_seconds(model: Model, task: Task, index: int) -> tuple[float, int]:
    """Time a vote for an image: its seconds, and the rows that were timed, doubled until they take ``LONG``.

    The rows of a whole block where memory is too small to time it.
    """
    rows, taken = 1, 0.0
    try:
        _seconds(model, task, index, rows)  # warms up
        while True:
            taken = _seconds(model, task, index, rows)
            if rows == task.block or 2 * taken > LONG:
                return taken / rows, rows
            rows = min(2 * rows, task.block)
    except Exception as e:
        if not blocks.out_of_memory(e):
            raise
        return taken / rows, task.block


def _seconds(model: Model, task: Task, index: int, rows: int) -> float:
    votes = task.rows("check", index)[:rows]
    x = task.noisy(task.image(index), votes)
    began = time.perf_counter()
    model(x, task.draw(votes)).sum().item()  # waits for an accelerator
    return time.perf_counter() - began
