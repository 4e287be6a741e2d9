"""What the name of a base stands for: a card's recipe, timm:MODEL, a hub id, a safetensors file or a timm folder."""

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
from bench.models.blueprints import Blueprint, Weights, card_size, from_config, from_described, unwrap
from bench.models.timm_configs import architecture_config, check_source, from_pretrained_cfg, input_size, read_config

_STEM, _CONFIG = "model", "config.json"
_WEIGHTS_FILE = f"{_STEM}.safetensors"
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
    if served.is_url(name):
        if not base:  # a card may be anybody's: pictures, and a token, go where the user says
            raise BenchError(f"card {card.name} names a server as its base; where you trust it, give --base {name}")
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
    """What the base of that name, one ``choose_base`` returned, can offer."""
    return Access.QUERY if served.is_url(name) else Access.WEIGHTS


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
        fetched = _fetch(card, repo, _CONFIG, revision or "main")
        # The weights of the very commit the config is of, whatever is pushed meanwhile.
        weights = _hub_weights(card, repo, hub.commit(fetched))
        return from_config(card, name, read_config(fetched, f"hub id {name}"), weights, _CONFIG)
    path = Path(name)
    if path.name == _WEIGHTS_FILE and (path.parent / _CONFIG).is_file():
        path = path.parent  # one of the two files that make a timm folder
    if path.is_dir():
        config = read_config(path / _CONFIG, f"folder {path}")
        return from_config(card, path.resolve().name, config, _folder_weights(path), _CONFIG)
    return _file(card, path)


def file_weights(path: Path, plan: Blueprint) -> Weights:
    """The weights in a local safetensors file for the base ``plan``, read when opened; they must fit name by name.

    Raises BenchError where the file is one of a timm folder whose config describes another classifier.
    """
    if path.name == _WEIGHTS_FILE and (path.parent / _CONFIG).is_file():
        theirs = blueprint(plan.card, str(path))
        for key in ("architecture", "size", "mean", "std"):
            if getattr(theirs, key) != getattr(plan, key):
                both = f"{key} {getattr(theirs, key)}, and base {plan.name} has {getattr(plan, key)}"
                raise BenchError(f"--weights {path}: its {_CONFIG} says {both}; give --base {path.parent} instead")

    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        stored = tensors.read(path)
        return stored.tensors, _file_record(path, stored)

    return Weights(read, adapt=False)


def _folder_weights(folder: Path) -> Weights:
    def read() -> tuple[dict[str, Tensor], dict[str, Any]]:
        stored, name = tensors.read_stored(_STEM, lambda name: local_file(folder, name))
        return stored.tensors, _file_record(folder / name, stored)

    return Weights(read, adapt=True)


def local_file(folder: Path, name: str) -> Path:
    """The path of a folder's file. Raises MissingFile where it has none of that name."""
    if not (folder / name).is_file():
        raise hub.MissingFile(f"{folder} has no file {name!r}")
    return folder / name


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
    size = input_size(recipe.args, architecture_config(recipe.model, f"card {card.name}: bases.{name}"))
    classes = len(only) or len(card.classes)
    made = Blueprint(card, name, recipe.model, recipe.args, card.mean, card.std, card_size(card, size), classes)
    size_from = "the card's recipe" if recipe.args.get("img_size") else f"timm's default for {recipe.model}"
    return replace(made, schedule=schedule, only=only, size_from=size_from)


def _published(card: Card, name: str, model: str, args: dict[str, Any]) -> Blueprint:
    """A model timm knows by name, with the weights it is published with."""
    config = _timm_config(model, name)
    repo = config.get("hf_hub_id")
    if not repo or config.get("hf_hub_filename"):
        raise BenchError(f"base {name}: timm has no safetensors of {model} on the hub, and pickles are refused")
    found = from_pretrained_cfg(f"base {name}", model, args, config)
    return from_described(card, name, found, _hub_weights(card, repo, "main"))


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
        fetched: list[Path] = []

        def fetch(name: str) -> Path:
            fetched.append(_fetch(card, repo, name, revision))
            return fetched[-1]

        stored, name = tensors.read_stored(_STEM, fetch)
        record = {"kind": "hub", "id": repo, "revision": hub.commit(fetched[-1]), "file": name}
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


def _not_in(where: str, filename: str, others: Sequence[str] = ()) -> hub.MissingFile:
    if others:
        return hub.MissingFile(f"{where} has no {filename}, and has {', '.join(others)}: give one of them as --base")
    if filename == _CONFIG:
        return hub.MissingFile(f"{where} has no {filename}: it is no timm model")
    return hub.MissingFile(
        f"{where} has no {filename}: pickled weights are refused, since opening one can run code hidden in "
        f"it; where you trust them, convert them with torch.load(..., weights_only=True) and safetensors' save_file"
    )


# Local files -----------------------------------------------------------------------------------------


def _file(card: Card, path: Path) -> Blueprint:
    """A local safetensors file: described by a sidecar, its metadata or its folder, or by the recipe its shapes fit."""
    stored = tensors.read(path)
    record = _file_record(path, stored)
    weights = Weights(lambda: (stored.tensors, record), adapt=True)
    sidecar = next((f for f in (Path(f"{path}.json"), path.with_suffix(".json")) if f.is_file()), None)
    beside = path.parent / _CONFIG
    if sidecar is not None:
        config, says = read_config(sidecar, f"file {path}"), sidecar.name
    elif "architecture" in stored.metadata:
        config, says = {k: _value(v) for k, v in stored.metadata.items()}, "its metadata"
    elif beside.is_file() and isinstance((config := read_config(beside, f"file {path}")).get("architecture"), str):
        return from_config(card, path.name, config, weights, _CONFIG)  # one of several weights in a timm folder
    else:
        fitting = _fitting_recipe(card, path, stored.tensors)
        size_from = f"the recipe {fitting.name} that it fits"
        return replace(fitting, weights=replace(weights, adapt=False), name=path.name, size_from=size_from)
    stated = config.get("pretrained_cfg") or {}
    own = isinstance(stated, dict) and "mean" not in stated  # else from_config says what is wrong
    if own:
        config = {**config, "pretrained_cfg": {**stated, "mean": card.mean, "std": card.std}}
    made = from_config(card, path.name, config, weights, says)
    return replace(made, mean_from="the card") if own else made


def _fitting_recipe(card: Card, path: Path, whole: Mapping[str, Tensor]) -> Blueprint:
    """The card's recipe whose tensors have the file's names and shapes, the head's number of classes left open."""
    stored = unwrap(whole)[0]
    fits: list[Blueprint] = []
    nearest: tuple[int, str] | None = None
    for name in card.bases:
        plan = _recipe(card, name)
        head = f"{architecture_config(plan.architecture, name).get('classifier')}.weight"
        ends = [v for k, v in stored.items() if k == head] or [v for k, v in stored.items() if k.endswith(f".{head}")]
        classes = len(ends[0]) if ends and ends[0].ndim else len(card.classes)
        # The card's normalisation, whatever the recipe trains from: a bare file states none.
        plan = replace(plan, classes=classes, schedule=None, mean=card.mean, std=card.std)
        with torch.device("meta"):  # shapes only, nothing allocated
            wanted = plan.fresh(classes).model.state_dict()
        wrong = tensors.mismatches(wanted, stored)
        if not wrong:
            fits.append(plan)
        elif nearest is None or len(wrong) < nearest[0]:
            nearest = len(wrong), f"{wrong[0]} in recipe {name}{tensors.prefix_hint(stored, wanted)}"
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


def _value(text: str) -> Any:
    """A metadata value: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
