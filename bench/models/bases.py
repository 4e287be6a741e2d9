"""From the name of a base to the base itself: its weights loaded, trained clean, or given a new head.

Each is made once; every defense of a comparison shares the result.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import globalstate
from bench.data.card import Card
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Schedule
from bench.models.base import BaseModel, Classifier, state_sha256
from bench.models.base_names import blueprint, file_weights
from bench.models.blueprints import Blueprint
from bench.models.labels import card_order, permute
from bench.models.probe import linear_probe, new_head
from bench.models.served import HTTPBase, is_url
from bench.training import loop, objectives
from bench.training.weights import Entry


def untrained_base(card: Card, name: str, device: torch.device, probe: bool = True) -> BaseModel:
    """The base of that name with fresh weights: what estimates are made on; ``probe`` as in ``load_base``.

    A served base is itself, and not asked yet.

    Raises BenchError where the name stands for no base or timm cannot make it.
    """
    if is_url(name):
        return HTTPBase(card, name)
    plan = blueprint(card, name)
    return plan.base(plan.fresh(len(card.classes) if probe else plan.made_for).to(device), {}, device)


def load_base(
    card: Card,
    name: str,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: loop.Progress,
    weights: Path | None = None,
    probe: bool = True,
) -> BaseModel:
    """The base of that name, for the card's classes; ``weights`` replaces its own by a user's file.

    What training it takes (a recipe's clean one, a linear probe where the classes still differ) is done
    once, whatever the defenses' seeds, and cached. Without ``probe`` it keeps the classes it has, for
    defenses that bring a head of their own. ``meta`` says where the weights come from, and what
    the training cost, in seconds. Raises BenchError with one line saying what to mend.
    """
    if is_url(name):
        if weights is not None:
            raise BenchError(f"--weights {weights}: base {name} is served elsewhere and takes none; leave one out")
        return HTTPBase(card, name)
    plan, classes = blueprint(card, name), len(card.classes)
    if weights is not None:
        plan = replace(plan, weights=file_weights(weights, plan), schedule=None, classes=classes)
    if plan.weights is None:
        with globalstate.fixed_rng(0):
            module, source = plan.fresh(plan.classes), {"kind": "trained here"}
    else:
        module, source = plan.load()
    meta: dict[str, Any] = {"source": source}
    if plan.weights is not None and plan.schedule is None and plan.classes == classes:
        # Where the card only numbers its classes, the data may name them.
        meta["classes"] = _in_card_order(plan, module, probe, train.names or card.classes)
    module = module.to(device)
    if plan.schedule is not None:
        meta |= _train_clean(plan, plan.schedule, module, train, validation, device, progress)
        plan = replace(plan, classes=plan.made_for)
    base = plan.base(module, meta, device)
    if probe and plan.classes != classes:
        # One base, with a probe or without: a report puts both in one table.
        meta |= {"before_probe": base.sha256} | linear_probe(plan, module, train, validation, device, progress)
        base = plan.base(module, meta, device)
    return base


def _in_card_order(plan: Blueprint, module: Classifier, used: bool, classes: tuple[str, ...]) -> str:
    """Put the logits of a loaded base into the order of ``classes``, as far as its names tell; what is known of it.

    Raises BenchError where names are at odds, unless its head is not ``used``.
    """
    card = plan.card
    try:
        order, remark = card_order(f"base {plan.name}", plan.names, classes, card.name)
    except BenchError:
        if used:
            raise
        return "its classes are others than the card's, and its head is replaced"
    if order != sorted(order):
        permute(f"base {plan.name}", module, order, card.shape)
    return remark


def _train_clean(
    plan: Blueprint,
    schedule: Schedule,
    module: Classifier,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: loop.Progress,
) -> dict[str, Any]:
    """Train every weight on clean images, or take that from the cache; what to record of it."""
    card, classes = plan.card, plan.made_for
    taught: dict[str, Any] = {}
    if plan.only:
        train, validation = (_only(split, plan) for split in (train, validation))
        taught = {"trained_on_classes": [card.classes[label] for label in plan.only]}
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
        "training": loop.SOURCE,
    }
    entry = Entry(f"{card.name}-base-{plan.name}", identity | taught)
    with entry.lock():
        trained = entry.load()
        if trained is None:
            spent: list[float] = []
            job = loop.TrainingJob(
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
    return taught | {k: trained.meta[k] for k in ("train_seconds", "validation_clean_accuracy")}


def _only(split: Split, plan: Blueprint) -> Split:
    """The images of the classes that ``plan.only`` names, labelled by their place in it."""
    place = np.full(len(plan.card.classes), -1)
    place[list(plan.only)] = range(len(plan.only))
    rows = np.flatnonzero(place[split.labels] >= 0)
    if not len(rows):
        raise BenchError(
            f"base {plan.name}: none of the {len(split)} {split.name} images is of its classes; "
            f"name others in the card, or give the preset more train_examples"
        )
    return replace(split.select(rows), labels=place[split.labels[rows]])
