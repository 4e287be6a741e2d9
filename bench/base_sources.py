"""What the name of a base stands for: a card's recipe, timm:MODEL, a hub id, a safetensors file or a timm folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bench import http_base, hub, limits, tensors
from bench.blueprints import (
    Blueprint,
    Weights,
    architecture_config,
    check_source,
    from_config,
    from_pretrained_cfg,
    input_size,
    unwrap,
)
from bench.cards import Card
from bench.errors import BenchError, one_line, unknown
from bench.interface import Access, Schedule

_WEIGHTS_FILE = "model.safetensors"
LARGEST = 16 * limits.MB  # of a config.json
_KINDS = "timm:MODEL, hf-hub:OWNER/NAME, a .safetensors file, a timm folder or http://HOST/v2/models/NAME"


def choose_base(card: Card, preset: str, base: str | None, adapts: bool = False) -> str:
    """The name of the base to use: ``base`` if given, else the preset's, else the card's first recipe.

    ``adapts``: a base of another task is wanted: ``base``, or the preset's ``transfer_base``. Raises
    BenchError for a name nobody knows, a missing file and a pickled one. Reads no weights and no
    network, so a hub id is not looked up.
    """
    means = card.presets[preset]
    name = base or (means.transfer_base if adapts else means.base or next(iter(card.bases), ""))
    if adapts and not name:
        raise BenchError(
            f"card {card.name} names no base of another task for preset {preset}: "
            f"set transfer_base in its [presets.{preset}], or give --base {_KINDS}"
        )
    if not name:
        raise BenchError(f"card {card.name} has no [bases.NAME] recipe; give --base {_KINDS}")
    if name in card.bases or _hub_id(name):
        return name
    if http_base.is_url(name):
        if not base:  # a card may be anybody's: pictures, and a token, go where the user says
            raise BenchError(f"card {card.name} names a server as its base; where you trust it, give --base {name}")
        return http_base.checked_url(name)
    if name.startswith("timm:"):
        _timm_config(name.removeprefix("timm:"), name)
    elif Path(name).is_dir():
        for needed in ("config.json", _WEIGHTS_FILE):
            if not (Path(name) / needed).is_file():
                raise _not_in(f"folder {name}", needed)
    elif Path(name).exists() or "/" in name or Path(name).suffix in (".safetensors", *tensors.PICKLED):
        tensors.refuse_pickle(Path(name))
    else:
        raise BenchError(f"{unknown('base', name, card.bases)}; or {_KINDS}")
    return name


def most_access(name: str) -> Access:
    """What the base of that name, one ``choose_base`` returned, can offer."""
    return Access.QUERY if http_base.is_url(name) else Access.WEIGHTS


def blueprint(card: Card, name: str) -> Blueprint:
    """The blueprint of the base of that name, one ``choose_base`` returned. Raises BenchError where there is none.

    For a hub id this fetches config.json; for a bare file it reads the weights, whose shapes say what it is.
    """
    if name in card.bases:
        return _recipe(card, name)
    if name.startswith("timm:"):
        return _published(card, name, name.removeprefix("timm:"), {})
    if hub_id := _hub_id(name):
        repo, _, revision = hub_id.partition("@")
        config = _fetch(card, repo, "config.json", revision or "main")
        # The weights of the very commit the config is of, whatever is pushed meanwhile.
        weights = _hub_weights(card, repo, hub.commit(config))
        return from_config(card, name, _json(config, f"hub id {name}"), weights)
    path = Path(name)
    if path.is_dir():
        weights = file_weights(path / _WEIGHTS_FILE, adapt=True)
        return from_config(card, path.resolve().name, _json(path / "config.json", f"folder {path}"), weights)
    return _file(card, path)


def file_weights(path: Path, adapt: bool) -> Weights:
    """The weights in a local safetensors file, read when opened; ``adapt`` as in ``Weights``."""

    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        stored = tensors.read(path)
        return stored.tensors, _file_record(path, stored)

    return Weights(read, adapt)


# Recipes and published models ------------------------------------------------------------------------


def _recipe(card: Card, name: str) -> Blueprint:
    recipe = card.bases[name]
    check_source(f"card {card.name}: bases.{name}", recipe.model, recipe.args)
    try:
        schedule = TypeAdapter(Schedule).validate_python(recipe.schedule)
    except ValidationError as e:
        raise BenchError(f"card {card.name}: bases.{name}.schedule: {e.errors()[0]['msg']}") from None
    for label in recipe.classes:
        if label not in card.classes:
            raise unknown(f"class in bases.{name}.classes of card {card.name}", label, card.classes)
    only = tuple(card.classes.index(label) for label in recipe.classes)
    if recipe.pretrained:
        return replace(_published(card, name, recipe.model, recipe.args), schedule=schedule, only=only)
    size = input_size(card, recipe.args, architecture_config(recipe.model, f"card {card.name}: bases.{name}"))
    classes = len(only) or len(card.classes)
    made = Blueprint(card, name, recipe.model, recipe.args, card.mean, card.std, size, classes)
    return replace(made, schedule=schedule, only=only)


def _published(card: Card, name: str, model: str, args: dict[str, Any]) -> Blueprint:
    """A model timm knows by name, with the weights it is published with."""
    config = _timm_config(model, name)
    repo = config.get("hf_hub_id")
    if not repo or config.get("hf_hub_filename"):
        raise BenchError(f"base {name}: timm has no safetensors of {model} on the hub, and pickles are refused")
    return from_pretrained_cfg(card, name, model, args, config, _hub_weights(card, repo, "main"))


def _timm_config(model: str, name: str) -> dict[str, Any]:
    """timm's pretrained_cfg of a model by name. Raises BenchError for a name timm does not know."""
    import timm

    if not timm.is_model(model):
        raise unknown("timm model", model, timm.list_models(pretrained=True))
    return architecture_config(model, f"base {name}")


# The hub ---------------------------------------------------------------------------------------------


def _hub_id(name: str) -> str:
    """OWNER/NAME[@REVISION] of a hub id, empty for other names."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    return name if name.startswith("timm/") else ""


def _hub_weights(card: Card, repo: str, revision: str) -> Weights:
    """The weights in a hub repository, fetched when opened."""

    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = _fetch(card, repo, _WEIGHTS_FILE, revision)
        stored = tensors.read(path)
        record = {"kind": "hub", "id": repo, "revision": hub.commit(path), "file": _WEIGHTS_FILE}
        return stored.tensors, record | {"sha256": stored.sha256}

    return Weights(read, adapt=True)


def _fetch(card: Card, repo: str, filename: str, revision: str) -> Path:
    here = [name for name, recipe in card.bases.items() if not recipe.pretrained]
    mend = "connect once, set HF_HUB_CACHE to a cache that has it, or give --base a folder with its config.json and "
    mend += _WEIGHTS_FILE + (f", or a base trained here: --base {here[0]}" if here else "")
    try:
        return hub.fetch(repo, filename, revision, "model", mend)
    except hub.MissingFile:
        raise _not_in(f"hub id {repo}", filename) from None


def _not_in(where: str, filename: str) -> BenchError:
    if filename == _WEIGHTS_FILE:
        return BenchError(
            f"{where} has no {filename}: pickled weights are refused, since opening one can run code hidden in "
            f"it; where you trust them, convert them with torch.load(..., weights_only=True) and safetensors' save_file"
        )
    return BenchError(f"{where} has no {filename}: it is no timm model")


# Local files -----------------------------------------------------------------------------------------


def _file(card: Card, path: Path) -> Blueprint:
    """A local safetensors file: described by a sidecar or its metadata, or by the recipe its shapes fit."""
    stored = tensors.read(path)
    record = _file_record(path, stored)
    weights = Weights(lambda: (stored.tensors, record), adapt=True)
    sidecar = next((f for f in (Path(f"{path}.json"), path.with_suffix(".json")) if f.is_file()), None)
    if sidecar is not None:
        config = _json(sidecar, f"file {path}")
    elif "architecture" in stored.metadata:
        config = {k: _value(v) for k, v in stored.metadata.items()}
    else:
        fitting = _fitting_recipe(card, path, unwrap(stored.tensors)[0])
        return replace(fitting, weights=replace(weights, adapt=False), name=path.name)
    stated = config.get("pretrained_cfg") or {}
    if isinstance(stated, dict) and "mean" not in stated:  # else from_config says what is wrong
        config = {**config, "pretrained_cfg": {**stated, "mean": card.mean, "std": card.std}}
    return from_config(card, path.name, config, weights)


def _fitting_recipe(card: Card, path: Path, stored: Mapping[str, Tensor]) -> Blueprint:
    """The card's recipe whose tensors have the file's names and shapes, the head's number of classes left open."""
    fits: list[Blueprint] = []
    nearest: tuple[int, str] | None = None
    for name in card.bases:
        plan = _recipe(card, name)
        head = f"{architecture_config(plan.architecture, name).get('classifier')}.weight"
        classes = int(stored[head].shape[0]) if head in stored else len(card.classes)
        # The card's normalisation, whatever the recipe trains from: a bare file states none.
        plan = replace(plan, classes=classes, schedule=None, mean=card.mean, std=card.std)
        with torch.device("meta"):  # shapes only, nothing allocated
            wrong = tensors.mismatches(plan.fresh(classes).model.state_dict(), stored)
        if not wrong:
            fits.append(plan)
        elif nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{wrong[0]} in recipe {name}"
    mend = f"say what it is in {path}.json: timm's config.json, with architecture, model_args, pretrained_cfg"
    if not fits:
        why = nearest[1] if nearest else "it has none"
        raise BenchError(f"{path} fits no base recipe of card {card.name}: {why}; {mend}")
    if any(plan.describe() != fits[0].describe() for plan in fits):
        names = " and ".join(plan.name for plan in fits)
        raise BenchError(f"{path} fits the recipes {names} of card {card.name} alike; {mend}")
    return fits[0]


def _file_record(path: Path, stored: tensors.Stored) -> dict[str, Any]:
    return {"kind": "file", "file": path.name, "sha256": stored.sha256}


def _json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises BenchError beginning with ``what``."""
    try:
        value = json.loads(limits.contents(path, LARGEST))
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{what}: {path.name} cannot be read: {one_line(e)}") from None
    if not isinstance(value, dict):
        raise BenchError(f"{what}: {path.name} must hold a JSON object")
    return value


def _value(text: str) -> Any:
    """A metadata value: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
