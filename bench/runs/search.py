"""Choose hyperparameters by accuracy under noise on the validation split; the test split is not used."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from bench.data.split import Split
from bench.models.arithmetic import deterministic
from bench.models.base import BaseModel
from bench.process import watchdog
from bench.runs import fitting
from bench.runs.plan import Plan
from bench.smoothing import blocks
from bench.smoothing.noise import Vote
from bench.smoothing.rows import Rows
from bench.smoothing.task import Task
from bench.training import loop

IMAGES, DRAWS = 500, 8  # maximum validation images, and noisy copies of each


def best(
    plan: Plan, base: BaseModel, train: Split, task: Task, images: int, progress: loop.Progress
) -> tuple[Plan, list[dict[str, Any]]]:
    """Return the plan with its best candidate (the first of equals), and the scores of all candidates.

    Each candidate is trained, or loaded from the cache. Its score is the fraction of noisy copies classified correctly.
    ``task`` is that of the validation split, which has ``images`` images.
    """
    tried: list[dict[str, Any]] = []
    scores: list[float] = []
    for values, config in plan.candidates:
        fitted = fitting.fit(replace(plan, config=config), base, train, task.device, progress)
        with deterministic(), torch.inference_mode(), fitting.attribute_errors(plan.defense, "on the validation split"):
            fits = blocks.fitting_block(fitted.defense, task, 0)
            score = accuracy_under_noise(fitted.defense, fits, min(images, IMAGES))
        scores.append(score)
        tried.append({"values": values, "config": asdict(config), "accuracy_under_noise": score})
    return replace(plan, config=plan.candidates[scores.index(max(scores))][1]), tried


def accuracy_under_noise(model: torch.nn.Module, task: Task, images: int) -> float:
    """Return the fraction of correct predictions on ``DRAWS`` noisy copies of each of the first ``images`` images."""
    copies = list(itertools.product(range(images), range(DRAWS)))
    right = 0
    for begin in range(0, len(copies), task.block):
        watchdog.heartbeat()
        part = copies[begin : begin + task.block]
        rows = Rows.of_votes([Vote("validate", i, k) for i, k in part], range(len(part)), task.device)
        pixels = torch.from_numpy(task.images([i for i, _ in part])).to(task.device)
        logits = task.logits(model, pixels, rows)
        labels = np.array([task.labels(i) for i, _ in part])
        right += int((logits.argmax(1).cpu().numpy() == labels).sum())
    return right / len(copies)
