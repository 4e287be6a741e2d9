"""Names of bases: a card's recipe, timm:MODEL, a hub id, a safetensors file, a timm folder or a server's address."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bench.data.card import Card
from bench.errors import BenchError, unknown
from bench.interface import Access, Schedule
from bench.io import hub, tensors
from bench.models import served
from bench.models.base import WeightsSource
from bench.models.blueprints import Blueprint, Weights, card_size, from_config, from_described, unwrap
from bench.models.timm_configs import architecture_config, check_source, from_pretrained_cfg, input_size, read_config

_STEM, _CONFIG = "model", "config.json"
_WEIGHTS_FILE = f"{_STEM}.safetensors"
_KINDS = "timm:MODEL, hf-hub:OWNER/NAME, a .safetensors file, a timm folder or http://HOST/v2/models/NAME"


def choose_base(card: Card, preset: str, base: str | None, adapts: bool = False, scratch: bool = False) -> str:
    """Choose the base: ``base`` if given, else the preset's, else the card's first recipe.

    Reads no weights and uses no network, so a hub id is not checked.

    Args:
        card: The data set.
        preset: Name of the preset.
        base: The value of ``--base``.
        adapts: Whether a base of another task is needed: ``base``, or the preset's ``transfer_base``.
        scratch: Whether only its architecture is used: the preset's ``scratch_base`` then comes before its ``base``.

    Raises:
        BenchError: The name is unknown, or its file is missing or a pickle.
    """
    means = card.presets[preset]
    usual = (scratch and means.scratch_base) or means.base or next(iter(card.bases), "")
    name = base or (means.transfer_base if adapts else usual)
    if adapts and not name:
        raise BenchError(
            f"card {card.name} has no base of another task for preset {preset}; "
            f"set transfer_base in its [presets.{preset}], or give --base {_KINDS}"
        )
    if not name:
        raise BenchError(f"card {card.name} has no [bases.NAME] recipe; give --base {_KINDS}")
    if name in card.bases or _hub_id(name):
        return name
    if served.is_url(name):
        if not base:  # a card is untrusted input, and pictures and a token would be sent to the server
            raise BenchError(f"card {card.name} names a server as its base; if you trust it, give --base {name}")
        return served.checked_url(name)
    if name.startswith("timm:"):
        _timm_config(name.removeprefix("timm:"), name)
    elif Path(name).is_dir():
        if not (Path(name) / _CONFIG).is_file():
            raise _not_in(f"folder {name}", _CONFIG)
        if not [*Path(name).glob(f"{_STEM}.*safetensors*")]:
            others = sorted(f.name for f in Path(name).glob("*.safetensors"))
            raise _not_in(f"folder {name}", _WEIGHTS_FILE, others)
    elif Path(name).exists() or "/" in name or Path(name).suffix in (".safetensors", *tensors.PICKLED):
        tensors.refuse_pickle(Path(name))
    else:
        raise BenchError(f"{unknown('base', name, card.bases)}; or {_KINDS}")
    return name


def most_access(name: str) -> Access:
    """Return the highest access that a base can offer; ``name`` as returned by ``choose_base``."""
    return Access.QUERY if served.is_url(name) else Access.WEIGHTS


def blueprint(card: Card, name: str) -> Blueprint:
    """Return the blueprint of a base; ``name`` as returned by ``choose_base``.

    For a hub id this fetches config.json; for a file without config it reads the weights, whose shapes identify the
    recipe. Raises BenchError where the base is not found or does not fit the card.
    """
    if name in card.bases:
        return _recipe(card, name)
    if name.startswith("timm:"):
        return _published(card, name, name.removeprefix("timm:"), {})
    if hub_id := _hub_id(name):
        repo, _, revision = hub_id.partition("@")
        fetched = _fetch(card, repo, _CONFIG, revision or "main")
        # The weights are of the same commit as the config, even if another is pushed meanwhile.
        weights = _hub_weights(card, repo, hub.commit(fetched))
        return from_config(card, name, read_config(fetched, f"hub id {name}"), weights, _CONFIG)
    path = Path(name)
    if path.name == _WEIGHTS_FILE and (path.parent / _CONFIG).is_file():
        path = path.parent  # the file is part of a timm folder
    if path.is_dir():
        config = read_config(path / _CONFIG, f"folder {path}")
        return from_config(card, path.resolve().name, config, _folder_weights(path), _CONFIG)
    return _file(card, path)


def file_weights(path: Path, plan: Blueprint) -> Weights:
    """Return the weights of a local safetensors file for a base; they are read later, and must fit name by name.

    Raises BenchError where the file is part of a timm folder whose config describes another classifier.
    """
    if path.name == _WEIGHTS_FILE and (path.parent / _CONFIG).is_file():
        theirs = blueprint(plan.card, str(path))
        for key in ("architecture", "size", "mean", "std", "resampling"):
            if getattr(theirs, key) != getattr(plan, key):
                both = f"{key} {getattr(theirs, key)}, and base {plan.name} has {getattr(plan, key)}"
                raise BenchError(f"--weights {path}: its {_CONFIG} says {both}; give --base {path.parent} instead")

    def read() -> tuple[dict[str, Tensor], WeightsSource]:
        stored = tensors.read(path)
        return stored.tensors, _file_record(path, stored)

    return Weights(read, adapt=False)


def _folder_weights(folder: Path) -> Weights:
    def read() -> tuple[dict[str, Tensor], WeightsSource]:
        stored, name = tensors.read_stored(_STEM, lambda name: local_file(folder, name))
        return stored.tensors, _file_record(folder / name, stored)

    return Weights(read, adapt=True)


def local_file(folder: Path, name: str) -> Path:
    """Return the path of a folder's file. Raises MissingFile where there is none of that name."""
    if not (folder / name).is_file():
        raise hub.MissingFile(f"{folder} has no file {name!r}")
    return folder / name


# Recipes and published models ------------------------------------------------------------------------


def _recipe(card: Card, name: str) -> Blueprint:
    recipe = card.bases[name]
    check_source(f"card {card.name}: bases.{name}", recipe.model, recipe.args)
    try:
        schedule = TypeAdapter(Schedule | None).validate_python(recipe.schedule)
    except ValidationError as e:
        raise BenchError(f"card {card.name}: bases.{name}.schedule: {e.errors()[0]['msg']}") from None
    for label in recipe.classes:
        if label not in card.classes:
            raise unknown(f"class in bases.{name}.classes of card {card.name}", label, card.classes)
    only = tuple(card.classes.index(label) for label in recipe.classes)
    if recipe.pretrained:
        return replace(_published(card, name, recipe.model, recipe.args), schedule=schedule, only=only)
    size = input_size(recipe.args, architecture_config(recipe.model, f"card {card.name}: bases.{name}"))
    classes = len(only) or len(card.classes)
    mean, std = recipe.mean or card.mean, recipe.std or card.std
    made = Blueprint(card, name, recipe.model, recipe.args, mean, std, card_size(card, size), classes)
    mean_from = "the card's recipe" if recipe.mean or recipe.std else made.mean_from
    size_from = "the card's recipe" if recipe.args.get("img_size") else f"timm's default for {recipe.model}"
    return replace(made, schedule=schedule, only=only, size_from=size_from, mean_from=mean_from)


def _published(card: Card, name: str, model: str, args: dict[str, Any]) -> Blueprint:
    """Return the blueprint of a model that timm knows by name, with its published weights."""
    config = _timm_config(model, name)
    repo = config.get("hf_hub_id")
    if not repo or config.get("hf_hub_filename"):
        raise BenchError(
            f"base {name}: timm has no safetensors of {model} on the hub, and pickles are refused; use another model"
        )
    found = from_pretrained_cfg(f"base {name}", model, args, config)
    return from_described(card, name, found, _hub_weights(card, repo, "main"))


def _timm_config(model: str, name: str) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a model. Raises BenchError for an unknown name."""
    from bench.models.architectures import timm

    if not timm.is_model(model):
        raise unknown("timm model", model, timm.list_models(pretrained=True))
    return architecture_config(model, f"base {name}")


# The hub ---------------------------------------------------------------------------------------------


def _hub_id(name: str) -> str:
    """Return OWNER/NAME[@REVISION] of a hub id, and an empty string for other names."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    return name if name.startswith("timm/") else ""


def _hub_weights(card: Card, repo: str, revision: str) -> Weights:
    """Return the weights of a hub repository, which are fetched later."""

    def read() -> tuple[dict[str, Tensor], WeightsSource]:
        fetched: list[Path] = []

        def fetch(name: str) -> Path:
            fetched.append(_fetch(card, repo, name, revision))
            return fetched[-1]

        stored, name = tensors.read_stored(_STEM, fetch)
        commit = hub.commit(fetched[-1])
        return stored.tensors, {"kind": "hub", "id": repo, "revision": commit, "file": name, "sha256": stored.sha256}

    return Weights(read, adapt=True)


def _fetch(card: Card, repo: str, filename: str, revision: str) -> Path:
    here = [name for name, recipe in card.bases.items() if not recipe.pretrained]
    fix = "connect once, set HF_HUB_CACHE to a cache that has it, or give --base a folder with its config.json and "
    fix += _WEIGHTS_FILE + (f", or a base trained here: --base {here[0]}" if here else "")
    try:
        return hub.fetch(repo, filename, revision, "model", fix)
    except hub.MissingFile:
        raise _not_in(f"hub id {repo}", filename) from None


def _not_in(where: str, filename: str, others: Sequence[str] = ()) -> hub.MissingFile:
    if others:
        return hub.MissingFile(f"{where} has no {filename}; it has {', '.join(others)}: give one of these as --base")
    if filename == _CONFIG:
        return hub.MissingFile(f"{where} has no {filename}: it is not a timm model; give another base")
    return hub.MissingFile(
        f"{where} has no {filename}: pickled weights are refused, since reading them can run hidden code; convert "
        f"its file, without running any: bench convert FILE --to {filename} --as tensors"
    )


# Local files -----------------------------------------------------------------------------------------


def _file(card: Card, path: Path) -> Blueprint:
    """Return the blueprint of a local file, from a sidecar, its metadata, its folder, or the recipe its shapes fit."""
    stored = tensors.read(path)
    record = _file_record(path, stored)
    weights = Weights(lambda: (stored.tensors, record), adapt=True)
    sidecar = next((f for f in (Path(f"{path}.json"), path.with_suffix(".json")) if f.is_file()), None)
    neighbour = path.parent / _CONFIG
    if sidecar is not None:
        config, origin = read_config(sidecar, f"file {path}"), sidecar.name
    elif "architecture" in stored.metadata:
        config, origin = {k: _value(v) for k, v in stored.metadata.items()}, "its metadata"
    elif neighbour.is_file() and isinstance(
        (config := read_config(neighbour, f"file {path}")).get("architecture"), str
    ):
        return from_config(card, path.name, config, weights, _CONFIG)  # one of several weight files of a timm folder
    else:
        fitting = _fitting_recipe(card, path, stored.tensors)
        return replace(fitting, weights=replace(weights, adapt=False), name=path.name)
    stated = config.get("pretrained_cfg") or {}
    own = isinstance(stated, dict) and "mean" not in stated  # if not a dict, from_config raises
    if own:
        config = {**config, "pretrained_cfg": {**stated, "mean": card.mean, "std": card.std}}
    made = from_config(card, path.name, config, weights, origin)
    return replace(made, mean_from="the card") if own else made


def _fitting_recipe(card: Card, path: Path, whole: Mapping[str, Tensor]) -> Blueprint:
    """Find the card's recipe whose tensors have the file's names and shapes, with any number of classes."""
    stored = unwrap(whole)[0]
    fits: list[Blueprint] = []
    nearest: tuple[int, str] | None = None
    for name in card.bases:
        plan = _recipe(card, name)
        head = f"{architecture_config(plan.architecture, name).get('classifier')}.weight"
        ends = [v for k, v in stored.items() if k == head] or [v for k, v in stored.items() if k.endswith(f".{head}")]
        classes = len(ends[0]) if ends and ends[0].ndim else len(card.classes)
        # With the recipe's or the card's normalisation, since a file without config states none.
        recipe, fitted = card.bases[name], f"the recipe {name} that it fits"
        mean, std = recipe.mean or card.mean, recipe.std or card.std
        mean_from = fitted if recipe.mean or recipe.std else "the card"
        plan = replace(plan, classes=classes, schedule=None, size_from=fitted, mean=mean, std=std, mean_from=mean_from)
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


def _file_record(path: Path, stored: tensors.Stored) -> WeightsSource:
    return {"kind": "file", "file": path.name, "sha256": stored.sha256}


def _value(text: str) -> Any:
    """Parse a metadata value as JSON; return the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
