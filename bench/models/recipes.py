"""Blueprints of a card's recipes and of the models that timm publishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bench.data.card import Card
from bench.errors import BenchError, unknown
from bench.io import tensors
from bench.models.blueprints import GIVEN, Blueprint, Normalisation, card_size, from_described, unwrap
from bench.models.sources import hub_weights
from bench.models.timm_configs import architecture_config, check_source, from_pretrained_cfg, input_size
from bench.training.clean import CleanSchedule


def recipe_base(card: Card, name: str) -> Blueprint:
    """Return the blueprint of a card's recipe. Raises BenchError where it is not valid."""
    recipe = card.bases[name]
    check_source(f"card {card.name}: bases.{name}", recipe.model, recipe.args)
    try:
        schedule = TypeAdapter(CleanSchedule | None).validate_python(recipe.schedule)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(["schedule", *map(str, first["loc"])])
        raise BenchError(f"card {card.name}: bases.{name}.{key}: {first['msg']}") from None
    if schedule and schedule.randaugment and card.levels != 256:
        raise BenchError(f"card {card.name}: bases.{name}.schedule.randaugment: needs images of 256 levels")
    for label in recipe.classes:
        if label not in card.classes:
            raise unknown(f"class in bases.{name}.classes of card {card.name}", label, card.classes)
    only = tuple(card.classes.index(label) for label in recipe.classes)
    if recipe.pretrained:
        return replace(published(card, name, recipe.model, recipe.args), schedule=schedule, only=only)
    size = input_size(recipe.args, architecture_config(recipe.model, f"card {card.name}: bases.{name}"))
    classes = len(only) or len(card.classes)
    mean, std = recipe.mean or card.mean, recipe.std or card.std
    made = Blueprint(card, name, recipe.model, recipe.args, mean, std, card_size(card, size), classes)
    mean_from = "the card's recipe" if recipe.mean or recipe.std else made.mean_from
    size_from = "the card's recipe" if recipe.args.get("img_size") else f"timm's default for {recipe.model}"
    return replace(made, schedule=schedule, only=only, size_from=size_from, mean_from=mean_from)


def published(card: Card, name: str, model: str, args: dict[str, Any]) -> Blueprint:
    """Return the blueprint of a model that timm knows by name, with its published weights."""
    config = timm_config(model, name)
    repo = config.get("hf_hub_id")
    if not repo or config.get("hf_hub_filename"):
        raise BenchError(
            f"base {name}: timm has no safetensors of {model} on the hub, and pickles are refused; use another model"
        )
    found = from_pretrained_cfg(f"base {name}", model, args, config)
    return from_described(card, name, found, hub_weights(card, repo, "main"))


def timm_config(model: str, name: str) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a model. Raises BenchError for an unknown name."""
    from bench.models.architectures import timm

    if not timm.is_model(model):
        raise unknown("timm model", model, timm.list_models(pretrained=True))
    return architecture_config(model, f"base {name}")


def fitting_recipe(card: Card, path: Path, whole: Mapping[str, Tensor], given: Normalisation | None) -> Blueprint:
    """Find the card's recipe whose tensors have the file's names and shapes, with any number of classes.

    The file states no mean and std: they are ``given``, else the recipe's or the card's.
    """
    if given and len(given[0]) != len(card.mean):
        raise BenchError(f"{GIVEN}: {len(given[0])} values; base {path.name} takes {len(card.mean)} channels")
    stored = unwrap(whole)[0]
    fits: list[Blueprint] = []
    nearest: tuple[int, str] | None = None
    for name in card.bases:
        plan = recipe_base(card, name)
        head = f"{architecture_config(plan.architecture, name).get('classifier')}.weight"
        ends = [v for k, v in stored.items() if k == head] or [v for k, v in stored.items() if k.endswith(f".{head}")]
        classes = len(ends[0]) if ends and ends[0].ndim else len(card.classes)
        plan = _normalised(replace(plan, classes=classes, schedule=None), path, given)
        with torch.device("meta"):  # shapes without memory
            wanted = plan.fresh(classes).model.state_dict()
        wrong = tensors.mismatches(wanted, stored)
        if not wrong:
            fits.append(plan)
        elif nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{wrong[0]} in recipe {name}{tensors.prefix_hint(stored, wanted)}"
    fix = f"describe it in {path}.json, as timm's config.json does (architecture, model_args, pretrained_cfg)"
    if not fits:
        why = nearest[1] if nearest else "it has none"
        raise BenchError(f"{path} fits no base recipe of card {card.name}: {why}; {fix}")
    if any((p.describe(), p.mean, p.std) != (fits[0].describe(), fits[0].mean, fits[0].std) for p in fits):
        names = " and ".join(plan.name for plan in fits)
        raise BenchError(f"{path} fits several recipes of card {card.name}: {names}; {fix}")
    return fits[0]


def _normalised(plan: Blueprint, path: Path, given: Normalisation | None) -> Blueprint:
    """Return the blueprint of a recipe with mean and std for a file that states none, and the sources of its values."""
    recipe, fitted = plan.card.bases[plan.name], f"the recipe {plan.name} that it fits"
    mean, std = given or (recipe.mean or plan.card.mean, recipe.std or plan.card.std)
    if given:
        mean_from = GIVEN
    else:
        source = fitted if recipe.mean or recipe.std else "the card"
        mean_from = f"{source}, since {path.name} states none: if it had others, give {GIVEN}"
    return replace(plan, mean=mean, std=std, size_from=fitted, mean_from=mean_from, states_mean=False)
