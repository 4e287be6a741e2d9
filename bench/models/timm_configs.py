"""Read timm configs: architecture, arguments, normalisation, input size and names of classes.

Configs are untrusted input: their architecture must not be an address, and their arguments must be the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from bench.errors import BenchError, one_line, unknown
from bench.io import limits
from bench.models.labels import Names, stated_names
from bench.models.timm_models import Architecture

LARGEST = 16 * limits.MB  # maximum size of a config.json


@dataclass(frozen=True)
class Described:
    """A model described by its config; fields ending in ``_from`` name the source of a value."""

    architecture: Architecture
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]  # height and width in pixels
    classes: int  # 0: no head
    interpolation: str  # by which images are resized to it; timm's name
    names: tuple[Names, ...]
    size_from: str
    mean_from: str
    interpolation_from: str


def read_config(path: Path, what: str) -> dict[str, Any]:
    """Read the object in a JSON file. Raises BenchError beginning with ``what``."""
    try:
        value = json.loads(limits.contents(path, LARGEST))
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{what}: {path.name} cannot be read: {one_line(e)}; save or fetch it again") from None
    if not isinstance(value, dict):
        raise BenchError(f"{what}: {path.name} must contain a JSON object; save or fetch it again")
    return value


def described(name: str, config: Mapping[str, Any], file: str) -> Described:
    """Read the model of a timm config (architecture, model_args, num_classes, pretrained_cfg).

    Missing values are timm's defaults for the architecture.

    Args:
        name: Beginning of messages.
        config: The config's object.
        file: Name of its file, for messages.

    Raises:
        BenchError: It is not a timm config, or sets an argument that certbench sets.
    """
    from timm.models import PretrainedCfg

    if odd := [k for k in ("model_args", "pretrained_cfg") if not isinstance(config.get(k) or {}, dict)]:
        raise BenchError(f"{name}: {odd[0]} in its config must be an object; fetch the config again")
    architecture, args = config.get("architecture"), dict(config.get("model_args") or {})
    if not isinstance(architecture, str):
        raise BenchError(
            f"{name}: its config has no timm architecture; only models of timm, and transformers' "
            f"ViTForImageClassification, can be read; give another base"
        )
    # Before timm 0.9 the file was the pretrained_cfg itself.
    stated = config.get("pretrained_cfg") or {k: v for k, v in config.items() if k != "architecture"}
    classes = config.get("num_classes", args.pop("num_classes", stated.get("num_classes")))
    known = {f.name for f in fields(PretrainedCfg)}
    check_source(f"{name}: its config", architecture, args)
    own = architecture_config(architecture, name)
    merged = own | {k: v for k, v in stated.items() if k in known}
    merged |= {} if classes is None else {"num_classes": classes}
    default = f"timm's default for {architecture}"
    size_from = default
    if "input_size" in stated:
        size_from = f"input_size in {file}"
        if [*own["input_size"]] == merged["input_size"]:
            size_from += f", which is {default}: correct it there if this model was trained at another size"
    if ("mean" in stated) != ("std" in stated):
        one, other = ("mean", "std") if "mean" in stated else ("std", "mean")
        raise BenchError(f"{name}: {file} states {one} without {other}; state both, as in training")
    made = from_pretrained_cfg(name, architecture, args, merged)
    return replace(
        made,
        names=stated_names(name, config, stated),
        size_from=made.size_from if args.get("img_size") else size_from,
        mean_from=file if "mean" in stated else default,
        interpolation_from=file if stated.get("interpolation") else default,
    )


def from_pretrained_cfg(
    name: str,
    architecture: str,
    args: dict[str, Any],
    config: dict[str, Any],
) -> Described:
    """Describe a timm architecture with the normalisation, input size and classes of a pretrained_cfg.

    The locations of weights in it are dropped. Raises BenchError where a value is missing.
    """
    from timm.models import filter_pretrained_cfg

    config = filter_pretrained_cfg(config, remove_source=True)  # type: ignore[no-untyped-call]
    try:
        channels = int(args.get("in_chans") or config["input_size"][0])
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        size, classes = input_size(args, config), int(config["num_classes"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
        raise BenchError(f"{name}: its config is not timm's: {one_line(e)}; save or fetch it again") from None
    if not len(mean) == len(std) == channels:
        raise BenchError(
            f"{name}: {channels} channels, but {len(mean)} values of mean and {len(std)} of std; correct its config"
        )
    size_from = "its argument img_size" if args.get("img_size") else "timm"
    model = Architecture(name, architecture, args, config)
    interpolation = str(config.get("interpolation") or "bicubic")  # as timm.data.resolve_data_config
    return Described(model, channels, mean, std, size, classes, interpolation, (), size_from, "timm", "timm")


def check_source(where: str, architecture: str, args: Mapping[str, Any]) -> None:
    """Raise BenchError where an untrusted architecture or its arguments could make timm read other files.

    The name must not be an address (hf-hub:, local-dir:), and the arguments must be the model's, not timm's own.
    """
    from bench.models.architectures import timm

    if re.search(r"[:/\\]", architecture):
        raise BenchError(f"{where}: {architecture!r} is an address; give the name of a timm model")
    if not timm.is_model(architecture):  # timm would raise too, but first prints the name unescaped
        raise BenchError(f"{where}: {unknown('timm model', architecture, timm.list_models())}")
    own = {*signature(timm.create_model).parameters, "pretrained_strict", "pretrained_filter_fn"}
    if forbidden := sorted(own & set(args)):
        raise BenchError(f"{where} must not set {forbidden[0]}; remove it")


def architecture_config(architecture: str, where: str) -> dict[str, Any]:
    """Return timm's own pretrained_cfg of an architecture, with or without a tag; defaults for an unknown one.

    Raises BenchError beginning with ``where`` for an unknown tag.
    """
    from timm.models import resolve_pretrained_cfg

    try:
        config: dict[str, Any] = resolve_pretrained_cfg(architecture).to_dict()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as e:
        raise BenchError(f"{where}: {one_line(e)}") from None
    return config


def input_size(args: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, int]:
    """Return a model's input height and width in pixels, from its arguments or pretrained_cfg. Raises BenchError."""
    size = args.get("img_size") or config["input_size"][-2:]
    try:
        height, width = (size, size) if isinstance(size, int) else (int(v) for v in size)
    except (TypeError, ValueError, OverflowError):
        raise BenchError(f"img_size {size!r:.40} must be a side in pixels, or a height and a width") from None
    return height, width
