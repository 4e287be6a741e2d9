"""Load a base classifier by name: stored weights, or weights trained clean here, with a new head where classes differ.

Each base is made once; all defenses of a comparison share it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench import globalstate
from bench.data.card import Card
from bench.data.split import Split
from bench.errors import BenchError
from bench.models.base import BaseModel, BaseRecord, Classifier, state_sha256
from bench.models.blueprints import Blueprint
from bench.models.labels import card_order, permute
from bench.models.names import Given, blueprint, file_weights
from bench.models.probe import linear_probe, new_head
from bench.models.served import HTTPBase, is_url
from bench.training import clean, loop, objectives, versions
from bench.training.weights import Weights, cached_training

NOTHING = Given()


def untrained_base(
    card: Card, name: str, device: torch.device, probe: bool = True, given: Given = NOTHING
) -> BaseModel:
    """Make the base of that name with random weights, for estimates; ``probe`` and ``given`` as in ``load_base``.

    For a served base no request is sent. Raises BenchError where the name is unknown or timm cannot make the model.
    """
    if is_url(name):
        return HTTPBase(card, name)
    plan = blueprint(card, name, given.normalisation)
    return plan.base(plan.fresh(len(card.classes) if probe else plan.made_for).to(device), {}, device)


def architecture_base(card: Card, name: str, device: torch.device) -> BaseModel:
    """Make the base of that name with random weights, always the same, for defenses that use its architecture alone."""
    with globalstate.fixed_rng(0):
        base = untrained_base(card, name, device)
    base.meta["source"] = {"kind": "untrained"}
    return base


def load_base(
    card: Card,
    name: str,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: loop.Progress,
    given: Given = NOTHING,
    probe: bool = True,
) -> BaseModel:
    """Load the base of that name for the card's classes.

    Its training (a recipe's clean training, a linear probe where classes differ) is done once, independent of the
    defenses' seeds, and cached. The base's ``meta`` records the source of its weights and the seconds of training.

    Args:
        card: The data set.
        name: As returned by ``choose_base``.
        train: Training images.
        validation: Images on which a trained base's clean accuracy is measured.
        device: Where the base computes.
        progress: Called with steps done, all steps, and loss.
        given: The user's weights in place of the base's own, and mean and std for weights that come with none.
        probe: Whether to fit a linear probe where the base has other classes than the card; False for defenses that
            bring their own head.

    Raises:
        BenchError: The base cannot be loaded or does not fit the card.
    """
    if is_url(name):
        if given.weights is not None:
            raise BenchError(f"--weights {given.weights}: base {name} is a remote model; leave out --weights or --base")
        return HTTPBase(card, name)
    plan, classes = blueprint(card, name, given.normalisation), len(card.classes)
    if given.weights is not None:
        plan = replace(plan, weights=file_weights(given.weights, plan), schedule=None, classes=classes)
    if plan.weights is None:
        with globalstate.fixed_rng(0):
            module = plan.fresh(plan.classes)
        meta: BaseRecord = {"source": {"kind": "trained here"}}
    else:
        module, source = plan.load()
        meta = {"source": source}
    if plan.weights is not None and plan.schedule is None and plan.classes == classes:
        # The data may name classes that the card only numbers.
        meta["classes"] = _in_card_order(plan, module, probe, train.names or card.classes)
    module = module.to(device)
    if plan.schedule is not None:
        meta |= _train_clean(plan, plan.schedule, module, (train, validation), device, progress)
        plan = replace(plan, classes=plan.made_for)
    base = plan.base(module, meta, device)
    if probe and plan.classes != classes:
        # Recorded, since a report shows a base with and without probe in one table.
        probed = linear_probe(plan, module, train, validation, device, progress)
        meta = {**meta, "before_probe": base.sha256, **probed}
        base = plan.base(module, meta, device)
    return base


def _in_card_order(plan: Blueprint, module: Classifier, used: bool, classes: tuple[str, ...]) -> str:
    """Permute the logits of a loaded base into the order of ``classes`` by its class names; return a remark on it.

    Raises BenchError where the names do not match, unless the head is not ``used``.
    """
    card = plan.card
    try:
        order, remark = card_order(f"base {plan.name}", plan.names, classes, card.name)
    except BenchError:
        if used:
            raise
        return "its classes differ from the card's, and its head is replaced"
    if order != sorted(order):
        permute(f"base {plan.name}", module, order, card.shape)
    return remark


def _train_clean(
    plan: Blueprint,
    schedule: clean.CleanSchedule,
    module: Classifier,
    splits: tuple[Split, Split],
    device: torch.device,
    progress: loop.Progress,
) -> BaseRecord:
    """Train all weights on clean images, or load them from the cache; return the record of the training.

    ``splits`` are train and validation.
    """
    card, classes = plan.card, plan.made_for
    train, validation = (_only(split, plan) for split in splits) if plan.only else splits
    subset: BaseRecord = {"trained_on_classes": [card.classes[label] for label in plan.only]} if plan.only else {}
    start = None if plan.weights is None else state_sha256(module)
    if start is not None and plan.classes != classes:
        new_head(module, classes, device)
    identity = plan.describe() | {
        "normalisation": [plan.mean, plan.std],
        "start": start,
        "schedule": schedule.identity(),
        "train": train.sha256(),
        "augment": card.augment,
        "classes": classes,
        "device": device.type,
        "versions": versions.of("clean") | ({"clean": clean.VERSION} if schedule.own() else {}),
    }

    def fit(checkpoint: Path) -> Weights:
        job = loop.TrainingJob(
            data=train,
            augment=card.augment,
            sigma=0.0,
            objective=objectives.clean,
            seed=0,
            device=device,
            checkpoint=checkpoint,
            progress=progress,
        )
        job.train(module, clean.loss(module, schedule, classes, plan.mean), schedule, schedule.clip_grad)
        accuracy = plan.accuracy(module, validation, device)
        return module.state_dict(), {"train_seconds": job.seconds, "validation_clean_accuracy": accuracy}

    trained = cached_training(f"{card.name}-base-{plan.name}", {**identity, **subset}, fit)
    module.load_state_dict(trained.state)
    seconds, accuracy = trained.meta["train_seconds"], trained.meta["validation_clean_accuracy"]
    made: BaseRecord = {"schedule": schedule.identity(), "train_seconds": seconds}
    return {**subset, **made, "validation_clean_accuracy": accuracy}


def _only(split: Split, plan: Blueprint) -> Split:
    """Select the images of the classes in ``plan.only``, labelled by their position in it."""
    place = np.full(len(plan.card.classes), -1)
    place[list(plan.only)] = range(len(plan.only))
    rows = np.flatnonzero(place[split.labels] >= 0)
    if not len(rows):
        raise BenchError(
            f"base {plan.name}: none of the {len(split)} {split.name} images is of its classes; "
            f"list other classes in the card, or raise the preset's train_examples"
        )
    return replace(split.select(rows), labels=place[split.labels[rows]])
