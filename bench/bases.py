"""From the name of a base to the base itself: its weights loaded, trained clean, or given a new head.

Each is made once; every defense of a comparison shares the result.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import objectives, training
from bench.base import BaseModel, Classifier, state_sha256
from bench.base_sources import blueprint, file_weights
from bench.blueprints import Blueprint
from bench.cache import Entry
from bench.cards import Card, Split
from bench.errors import BenchError
from bench.http_base import HTTPBase, is_url
from bench.interface import Schedule
from bench.probe import linear_probe, new_head


def untrained_base(card: Card, name: str, device: torch.device) -> BaseModel:
    """The base of that name with fresh weights, for the card's classes: what estimates are made on.

    A served base is itself, and not asked yet.

    Raises BenchError where the name stands for no base or timm cannot make it.
    """
    if is_url(name):
        return HTTPBase(card, name)
    plan = blueprint(card, name)
    return plan.base(plan.fresh(len(card.classes)).to(device), {}, device)


def load_base(
    card: Card,
    name: str,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: training.Progress,
    weights: Path | None = None,
) -> BaseModel:
    """The base of that name, for the card's classes; ``weights`` replaces its own by a user's file.

    What training it takes (a recipe's clean one, or a linear probe where the classes differ) is done
    once, whatever the defenses' seeds, and cached. ``meta`` says where the weights come from, and what
    the training cost, in seconds. Raises BenchError with one line saying what to mend.
    """
    if is_url(name):
        if weights is not None:
            raise BenchError(f"--weights {weights}: base {name} is served elsewhere and takes none; leave one out")
        return HTTPBase(card, name)
    plan, classes = blueprint(card, name), len(card.classes)
    if weights is not None:
        plan = replace(plan, weights=file_weights(weights, adapt=False), schedule=None, classes=classes)
    if plan.weights is None:
        with training.fixed_rng(0):
            module, source = plan.fresh(classes), {"kind": "trained here"}
    else:
        module, source = plan.load()
    module = module.to(device)
    meta: dict[str, Any] = {"source": source}
    if plan.schedule is not None:
        meta |= _train_clean(plan, plan.schedule, module, train, validation, device, progress)
    elif plan.classes != classes:
        meta |= linear_probe(plan, module, train, validation, device, progress)
    return plan.base(module, meta, device)


def _train_clean(
    plan: Blueprint,
    schedule: Schedule,
    module: Classifier,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: training.Progress,
) -> dict[str, Any]:
    """Train every weight on clean images, or take that from the cache; what to record of it."""
    card, classes = plan.card, len(plan.card.classes)
    start = None if plan.weights is None else state_sha256(module)
    if start is not None and plan.classes != classes:
        new_head(module, classes, device)
    identity = plan.describe() | {
        "normalisation": [plan.mean, plan.std],
        "start": start,
        "schedule": asdict(schedule),
        "train": train.sha256(),
        "augment": card.augment,
        "classes": classes,
        "device": device.type,
        "training": training.SOURCE,
    }
    entry = Entry(f"{card.name}-base-{plan.name}", identity)
    with entry.lock():
        trained = entry.load()
        if trained is None:
            spent: list[float] = []
            job = training.TrainingJob(
                data=train,
                augment=card.augment,
                sigma=0.0,
                objective=objectives.clean,
                seed=0,
                device=device,
                checkpoint=entry.checkpoint,
                progress=progress,
                spent=spent,
            )
            job.train(module, lambda x, y, draw: job.objective(lambda z, _: module(z), x, y, draw), schedule)
            accuracy = plan.accuracy(module, validation, device)
            meta = {"train_seconds": sum(spent), "validation_clean_accuracy": accuracy}
            trained = entry.save(module.state_dict(), meta)
    module.load_state_dict(trained.state)
    return {k: trained.meta[k] for k in ("train_seconds", "validation_clean_accuracy")}
