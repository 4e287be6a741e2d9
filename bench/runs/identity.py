"""Build what decides a run's certificates: its images, its task for the engine, its identity in the record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from numpy.typing import NDArray

from bench import plugins
from bench.data.datasets import choose
from bench.data.split import Split
from bench.models.base import BaseModel
from bench.records.schema import Identity
from bench.records.stored import parse_json
from bench.runs.fitting import Fitted
from bench.runs.plan import SCHEDULE, Plan
from bench.smoothing import gridnoise, noise, thresholds
from bench.smoothing.noise import Noise
from bench.smoothing.procedures import describe
from bench.smoothing.rows import add_float
from bench.smoothing.task import Task, block_rows


def run_name(plan: Plan) -> str:
    """Name the run's folder, without its hash."""
    return f"{plan.card.name}-{plugins.short_name(plan.defense)}-s{plan.sigma:g}"


def run_label(plan: Plan) -> str:
    """Name a run whose hash is not known, with all that distinguishes the runs of one command."""
    settings = [f"{k}={v}" for k, v in plan.changed.items()]
    sought = [f"{key} searched" for key in dict.fromkeys(k for values, _ in plan.candidates for k in values)]
    return ", ".join([run_name(plan), *settings, *sought, f"seed {plan.seed}"])


def examples(plan: Plan, split: Split) -> list[int]:
    """Choose the images that a plan certifies.

    A preset's number is meant for the test split: of a smaller split of another name all images are taken.
    """
    asked = plan.examples
    if plan.split != "test" and plan.options.examples is None and asked.isdigit():
        asked = str(min(int(asked), len(split)))
    return choose(split, asked)


def make_task(
    plan: Plan, split: Split, device: torch.device, replaced_noise: Noise | None = None, rows: int | None = None
) -> Task:
    """Make the engine's task of a plan.

    ``replaced_noise``: used in place of the noise of its seed and split; ``rows`` of a block: default, those for the
    device.
    """
    source = replaced_noise or Noise(plan.seed, split.name)
    images: Callable[[list[int]], NDArray[Any]] = split.pixels
    noisy = add_float(source, plan.sigma)
    if plan.noise == "grid":
        kind = gridnoise.KINDS[plan.grid_version]
        images, noisy = split.integers, kind(source, plan.sigma, plan.card.levels).inputs
    return Task(
        images=images,
        labels=lambda i: int(split.labels[i]),
        noisy=noisy,
        shape=plan.card.shape,
        classes=len(plan.card.classes),
        sigma=plan.sigma,
        noise=source,
        block=rows or block_rows(plan.card.shape, device),
        device=device,
        noise_on_cpu=plan.noise == "float" or plan.grid_version != gridnoise.VERSION,
    )


def describe_noise(plan: Plan) -> dict[str, Any]:
    """Describe the noise; ``tau``: what the sampling error of grid noise costs the bound."""
    found: dict[str, Any] = {"kind": plan.noise, "version": noise.VERSION, "tau": 0.0}
    if plan.noise == "grid":
        tau = thresholds.tau(plan.sigma, plan.card.levels, math.prod(plan.card.shape))
        found |= {"grid_version": plan.grid_version, "levels": plan.card.levels, "tau": tau}
    return found


def _config(plan: Plan, fitted: Fitted) -> dict[str, Any]:
    """Return the defense's config, without a schedule that did not train its weights."""
    found = asdict(plan.config)
    return {k: v for k, v in found.items() if k not in SCHEDULE} if fitted.given else found


def _train_sigma(plan: Plan, fitted: Fitted) -> float | None:
    """Return the noise level of training; None: not known, of weights that the user gave."""
    if fitted.uses_train_sigma:
        return plan.train_sigma
    return plan.options.train_sigma if fitted.given else plan.sigma


def identity(plan: Plan, base: BaseModel, split: Split, fitted: Fitted, indices: list[int], task: Task) -> Identity:
    """Collect all that determines the certificates of ``indices`` of ``split``."""
    uses_objective = fitted.sha256 and plan.weights is None and plan.uses_objective
    constants = plan.training_objective.constants() if uses_objective else {}
    found = {
        "dataset": plan.card.name,
        "card": plan.card.sha256(),
        "split": plan.split,
        "indices": indices,
        "images": split.sha256(indices),
        "base": base.identity(),
        "defense": {
            "name": plugins.short_name(plan.defense),
            "source": plan.source,
            "config": _config(plan, fitted),
            "weights": fitted.sha256,
            "parts": fitted.parts,
            "objective": plan.objective if uses_objective else None,
            **({"objective_constants": constants} if constants else {}),
            **({"arithmetic": list(plan.arithmetic)} if plan.arithmetic else {}),
            **({"training_arithmetic": fitted.training_arithmetic} if fitted.training_arithmetic else {}),
        },
        "train_sigma": _train_sigma(plan, fitted),
        "sigma": plan.sigma,
        "noise": describe_noise(plan),
        "procedure": describe(plan.procedure),
        "bound": "clopper-pearson",
        "seed": plan.seed,
        "block": [task.block, *task.shape],
        "dtype": "float32",
        "device": task.device.type,
    }
    return Identity.of(parse_json(json.dumps(found)))
