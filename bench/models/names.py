"""Names of bases: a card's recipe, timm:MODEL, a hub id, a safetensors file, a folder or a server's address."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.data.card import Card
from bench.errors import BenchError, unknown
from bench.interface import Access
from bench.io import hub, tensors
from bench.models import served, transformers_vit
from bench.models.base import WeightsSource
from bench.models.blueprints import (
    GIVEN,
    Blueprint,
    Normalisation,
    Weights,
    from_config,
)
from bench.models.recipes import fitting_recipe, published, recipe_base, timm_config
from bench.models.sources import (
    CONFIG,
    STEM,
    WEIGHTS_FILE,
    fetch_file,
    file_record,
    folder_weights,
    hub_id,
    hub_weights,
    local_file,
    not_in,
    optional,
)
from bench.models.timm_configs import read_config

_KINDS = "timm:MODEL, hf-hub:OWNER/NAME, a .safetensors file, a folder or http://HOST/v2/models/NAME"


@dataclass(frozen=True)
class Given:
    """What a user gives for a base besides its name."""

    weights: Path | None = None  # --weights, in place of the base's own
    normalisation: Normalisation | None = None  # --mean and --std, for weights that come with none


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
    if name in card.bases or hub_id(name):
        return name
    if served.is_url(name):
        if not base:  # a card is untrusted input, and pictures and a token would be sent to the server
            raise BenchError(f"card {card.name} names a server as its base; if you trust it, give --base {name}")
        return served.checked_url(name)
    if name.startswith("timm:"):
        timm_config(name.removeprefix("timm:"), name)
    elif Path(name).is_dir():
        if not (Path(name) / CONFIG).is_file():
            raise not_in(f"folder {name}", CONFIG)
        if not [*Path(name).glob(f"{STEM}.*safetensors*")]:
            others = sorted(f.name for f in Path(name).glob("*.safetensors"))
            raise not_in(f"folder {name}", WEIGHTS_FILE, others)
    elif Path(name).exists() or "/" in name or Path(name).suffix in (".safetensors", *tensors.PICKLED):
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) and not Path(name).exists():
            raise BenchError(f"no file {name}; if it is a repository of the hub, give --base hf-hub:{name}")
        tensors.refuse_pickle(Path(name))
    else:
        raise BenchError(f"{unknown('base', name, card.bases)}; or {_KINDS}")
    return name


def most_access(name: str) -> Access:
    """Return the highest access that a base can offer; ``name`` as returned by ``choose_base``."""
    return Access.QUERY if served.is_url(name) else Access.WEIGHTS


def blueprint(card: Card, name: str, given: Normalisation | None = None) -> Blueprint:
    """Return the blueprint of a base.

    For a hub id this fetches config.json; for a file without config it reads the weights, whose shapes identify the
    recipe.

    Args:
        card: The data set.
        name: As returned by ``choose_base``.
        given: ``--mean`` and ``--std``, for weights that come with none.

    Raises:
        BenchError: The base is not found, does not fit the card, or states its own mean and std.
    """
    made = _blueprint(card, name, given)
    if given and made.mean_from != GIVEN:
        raise BenchError(
            f"{GIVEN} have no effect: base {made.name} has those of {made.mean_from}; leave them out, or correct those"
        )
    return made


def _blueprint(card: Card, name: str, given: Normalisation | None) -> Blueprint:
    if name in card.bases:
        return recipe_base(card, name)
    if name.startswith("timm:"):
        return published(card, name, name.removeprefix("timm:"), {})
    if whole := hub_id(name):
        repo, _, revision = whole.partition("@")
        fetched = fetch_file(card, repo, CONFIG, revision or "main")
        # The weights are of the same commit as the config, even if another is pushed meanwhile.
        commit = hub.commit(fetched)
        config = read_config(fetched, f"hub id {name}")
        weights = hub_weights(card, repo, commit)
        return _configured(card, name, config, weights, lambda file: fetch_file(card, repo, file, commit), given)
    path = Path(name)
    if path.name == WEIGHTS_FILE and (path.parent / CONFIG).is_file():
        path = path.parent  # the file is part of a folder
    if path.is_dir():
        config, name = read_config(path / CONFIG, f"folder {path}"), path.resolve().name
        return _configured(card, name, config, folder_weights(path), lambda file: local_file(path, file), given)
    return _file(card, path, given)


def file_weights(path: Path, plan: Blueprint) -> Weights:
    """Return the weights of a local safetensors file for a base; they are read later, and must fit name by name.

    Raises BenchError where the file comes with a config that describes another classifier.
    """
    found = _config_of(path, tensors.metadata(path))
    if found is None:
        return Weights(lambda: _read(path), adapt=False)
    origin, folder = found[1].removeprefix("its "), path.parent if path.name == WEIGHTS_FILE else path
    theirs = blueprint(plan.card, str(path))
    for key in ("architecture", "size", "resampling", *(("mean", "std") if theirs.states_mean else ())):
        if getattr(theirs, key) != getattr(plan, key):
            both = f"{key} {getattr(theirs, key)}, and base {plan.name} has {getattr(plan, key)}"
            raise BenchError(f"--weights {path}: its {origin} says {both}; give --base {folder} instead")
    assert theirs.weights is not None
    weights = replace(theirs.weights, adapt=False)
    # Arguments that shapes do not determine, such as the number of heads, show in the logits.
    same = replace(theirs, weights=weights, mean=plan.mean, std=plan.std)
    mine = replace(plan, weights=weights, schedule=None, classes=len(plan.card.classes))
    x = torch.rand(2, *plan.card.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, ours = (made.load()[0](x) for made in (same, mine))
    if not torch.allclose(wanted, ours, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
        raise BenchError(
            f"--weights {path}: its {origin} describes another model of {plan.architecture} than base {plan.name}: "
            f"their logits differ; give --base {folder} instead"
        )
    return weights


def _read(path: Path) -> tuple[dict[str, Tensor], WeightsSource]:
    stored = tensors.read(path)
    return stored.tensors, file_record(path, stored)


def _configured(
    card: Card,
    name: str,
    config: Mapping[str, Any],
    weights: Weights,
    fetch: Callable[[str], Path],
    given: Normalisation | None,
) -> Blueprint:
    """Return the blueprint of weights with a config.json, timm's or transformers'; ``fetch`` finds its other files."""
    if not transformers_vit.recognised(config):
        return from_config(card, name, config, weights, CONFIG)
    base = f"base {name}"
    transformers_vit.check_class(base, config)
    file = optional(fetch, transformers_vit.PROCESSOR)
    processor = None if file is None else transformers_vit.read_processor(base, read_config(file, base))
    if processor is None:
        if given is None:
            raise BenchError(
                f"{base} has no {transformers_vit.PROCESSOR} with its mean and std; add it, or give {GIVEN}"
            )
        processor = transformers_vit.Preprocessor(list(given[0]), list(given[1]), None, "")
        mean_from = GIVEN
    else:
        mean_from = transformers_vit.PROCESSOR
    translated = transformers_vit.timm_config(base, config, processor)

    def read() -> tuple[dict[str, Tensor], WeightsSource]:
        stored, record = weights.open()
        found, remarks = transformers_vit.renamed(stored)
        if remarks := [*remarks, *transformers_vit.dropout(config)]:
            record = {**record, "remarks": remarks}
        return found, record

    made = from_config(card, name, translated, Weights(read, adapt=False), CONFIG)
    resampled = transformers_vit.PROCESSOR if processor.interpolation else transformers_vit.DEFAULT_FROM
    return replace(made, size_from=f"image_size in {CONFIG}", mean_from=mean_from, interpolation_from=resampled)


# Local files -----------------------------------------------------------------------------------------


def _file(card: Card, path: Path, given: Normalisation | None) -> Blueprint:
    """Return the blueprint of a local file, from its config, or from the recipe that its shapes fit."""
    stored = tensors.read(path)
    record = file_record(path, stored)
    weights = Weights(lambda: (stored.tensors, record), adapt=True)
    mean, std = given or (card.mean, card.std)
    mean_from = GIVEN if given else f"the card, since {path.name} states none: if it had others, give {GIVEN}"
    found = _config_of(path, stored.metadata)
    if found is None:
        fitting = fitting_recipe(card, path, stored.tensors, given)
        return replace(fitting, weights=replace(weights, adapt=False), name=path.name)
    config, origin = found
    if origin == CONFIG:  # one of several weight files of a folder
        return _configured(card, path.name, config, weights, lambda file: local_file(path.parent, file), given)
    stated = config.get("pretrained_cfg") or {}
    if not isinstance(stated, dict) or "mean" in stated or "std" in stated:
        return from_config(card, path.name, config, weights, origin)  # which refuses one without the other
    config = {**config, "pretrained_cfg": {**stated, "mean": mean, "std": std}}
    made = from_config(card, path.name, config, weights, origin)
    return replace(made, mean_from=mean_from, states_mean=False)


def _config_of(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str] | None:
    """Return the config of a local file and its origin: a sidecar, the file's metadata, config.json in its folder."""
    sidecar = next((f for f in (Path(f"{path}.json"), path.with_suffix(".json")) if f.is_file()), None)
    if sidecar is not None:
        return read_config(sidecar, f"file {path}"), sidecar.name
    if "architecture" in metadata:
        return {k: _value(v) for k, v in metadata.items()}, "its metadata"
    if (path.parent / CONFIG).is_file():
        config = read_config(path.parent / CONFIG, f"file {path}")
        if isinstance(config.get("architecture"), str) or transformers_vit.recognised(config):
            return config, CONFIG
    return None


def _value(text: str) -> Any:
    """Parse a metadata value as JSON; return the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
