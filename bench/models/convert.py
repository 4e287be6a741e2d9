"""Convert pickled checkpoints: classifiers to safetensors with a config, and denoisers to safetensors.

Diffusion models are in ``convert_diffusion``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.errors import BenchError
from bench.io import pickled, tensors
from bench.io.files import file_sha256, replacing, write_json, writing
from bench.models import convert_diffusion
from bench.models.convert_diffusion import WEIGHTS
from bench.models.timm_configs import architecture_config, check_source
from bench.models.timm_models import Architecture

# Of DataParallel, and of the network behind Cohen et al.'s normalisation layer, which has no tensors of its own.
_WRAPPED, _NORMALISED = "module.", "1."
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Architecture and classes -> the data set and the values of its released normalisation layer.
_RELEASED = {("resnet110", 10): ("CIFAR-10", _CIFAR10), ("resnet50", 1000): ("ImageNet", _IMAGENET)}
TENSORS = "tensors"  # --as: no config


@dataclass(frozen=True)
class Stated:
    """What a user states about a checkpoint, beside the file."""

    kind: str = ""  # a timm model, or "tensors"; empty: recognise the network
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flags: str = ""  # of a diffusion model, as its authors publish them


@dataclass(frozen=True)
class Converted:
    """A checkpoint in the layout that certbench reads."""

    what: str
    tensors: dict[str, Tensor]
    jsons: dict[str, dict[str, Any]] = field(default_factory=dict)  # in a folder by name, beside a file by suffix
    notes: Sequence[str] = ()
    folder: bool = False
    use: str = ""  # how to use it; {out} is its path


def convert(file: Path, out: Path, stated: Stated) -> list[str]:
    """Convert a checkpoint and write it; return lines that say what was done.

    Raises BenchError where the file is no checkpoint, or holds a network that is not recognised.
    """
    found = pickled.read(file)
    lines = [f"read {file}" + (f": the entry {found.entry}" if found.entry else "")]
    state, prefix = (found.tensors, "") if stated.kind == TENSORS else _unwrapped(found.tensors)
    made = _recognised(file, state, prefix, stated, found.dropped)
    if made.folder == (out.suffix == ".safetensors"):
        wanted = "a folder" if made.folder else "a file NAME.safetensors"
        raise BenchError(f"{file} is {made.what}, which is converted to {wanted}: change --to {out}")
    lines.append(f"recognised: {made.what}")
    if prefix:
        lines.append(f"renamed: the prefix {prefix!r} is removed from all {len(state)} names")
    lines += made.notes
    if found.dropped:
        lines.append(f"dropped: {', '.join(found.dropped)}")
    wrote = _write(made, out, {"format": "pt", "converted_from": file.name, "source_sha256": file_sha256(file)})
    return [*lines, f"wrote: {', '.join(map(str, wrote))}", *([made.use.format(out=out)] if made.use else [])]


def _write(made: Converted, out: Path, metadata: dict[str, str]) -> list[Path]:
    weights = out / f"{WEIGHTS}.safetensors" if made.folder else out
    jsons = {out / name if made.folder else Path(f"{out}{name}"): value for name, value in made.jsons.items()}
    for path in (out, *jsons):
        if path.exists():
            raise BenchError(f"{path} exists; choose another --to, or delete it")
    with writing(out, "choose another --to"):
        weights.parent.mkdir(parents=True, exist_ok=True)
        for path, value in jsons.items():
            write_json(path, value)
        with replacing(weights) as partial:
            save_file(made.tensors, partial, metadata=metadata)
    return [weights, *jsons]


def _unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove wrappers' prefixes that all names have; return them too."""
    prefix = ""
    while found := next((p for p in (_WRAPPED, _NORMALISED) if all(k.startswith(p) for k in state)), ""):
        state, prefix = {k.removeprefix(found): v for k, v in state.items()}, prefix + found
    return dict(state), prefix


def _recognised(file: Path, state: dict[str, Tensor], prefix: str, stated: Stated, dropped: Sequence[str]) -> Converted:
    """Recognise the network and convert it. Raises BenchError naming what was found."""
    normalised = bool(stated.mean or stated.std)
    kind = stated.kind or _kind(state)
    if kind in ("diffusion", "dncnn", TENSORS) and normalised:
        raise BenchError(f"--mean and --std have no effect: {file} is converted as {kind}; leave them out")
    if stated.flags and kind != "diffusion":
        raise BenchError(f"--flags describe a diffusion model; {file} is converted as {kind or 'none'}; leave it out")
    if kind == "diffusion":
        return _diffusion(file, state, stated.flags)
    if kind == "dncnn":
        return _dncnn(file, state)
    if kind == TENSORS:
        return Converted(f"{len(state)} tensors, their names unchanged, without a config", state)
    if kind:
        return _classifier(file, kind, state, _NORMALISED in prefix, stated)
    some = ", ".join(f"{k} {list(v.shape)}" for k, v in [*state.items()][:3])
    about = f"; beside them {', '.join(dropped)}" if dropped else ""
    raise BenchError(
        f"{file}: no network that bench convert recognises: {len(state)} tensors ({some}, ...){about}; give --as with "
        f"the name of a timm model, or --as {TENSORS} to keep names and write no config"
    )


def _kind(state: Mapping[str, Tensor]) -> str:
    """Return the kind of network by names that no other has; an empty string where it is unknown."""
    if {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= state.keys():
        return "diffusion"
    if "dncnn.0.weight" in state:
        return "dncnn"
    stem = state.get("conv1.weight")
    if stem is None or "fc.weight" not in state:
        return ""
    if stem.shape == (16, 3, 3, 3) and "layer3.17.conv2.weight" in state:
        return "resnet110"
    return "resnet50" if stem.shape == (64, 3, 7, 7) and "layer3.5.conv3.weight" in state else ""


# Classifiers -----------------------------------------------------------------------------------------


def _classifier(
    file: Path, architecture: str, state: dict[str, Tensor], after_layer: bool, stated: Stated
) -> Converted:
    check_source("--as", architecture, {})
    own = architecture_config(architecture, "--as")
    head, side = own["classifier"], own["input_size"][1:]
    classes = _classes(file, state, head if isinstance(head, str) else head[0])
    with torch.device("meta"):  # shapes without memory
        wanted = Architecture(str(file), architecture, {}, None).create(classes).state_dict()
    counters = {k for k in wanted if k.endswith(tensors.COUNTER)}
    tensors.check(f"{file} is not {architecture}", wanted, state, counters)  # older torch stores no counters
    mean, std, origin = _normalisation(file, architecture, classes, after_layer, stated)
    count = sum(v.numel() for k, v in state.items() if not re.search(r"\.(running_\w+|num_batches_tracked)$", k))
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "pretrained_cfg": {
            "mean": mean,
            "std": std,
            "input_size": [3, *side],
            "interpolation": "bilinear",  # as torchvision's default, which the released code uses
            "num_classes": classes,
        },
    }
    return Converted(
        f"{architecture}, {classes} classes, {count:,} parameters",
        state,
        {".json": config},
        [
            f"mean {_numbers(mean)}, std {_numbers(std)}: {origin}",
            f"input size {side[0]}x{side[1]}: "
            + (
                "as released"
                if (architecture, classes) in _RELEASED
                else "timm's default; correct input_size in the .json if needed"
            ),
        ],
        use="use: bench run --base {out}",
    )


def _classes(file: Path, state: Mapping[str, Tensor], head: str) -> int:
    weight = state.get(f"{head}.weight")
    if weight is None or not weight.ndim:
        raise BenchError(
            f"{file}: no tensor {head}.weight, the head; it has {', '.join([*state][:3])}, ...; correct --as"
        )
    return len(weight)


def _normalisation(
    file: Path, architecture: str, classes: int, after_layer: bool, stated: Stated
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return mean, std and their source; values are never guessed."""
    if stated.mean or stated.std:
        if not len(stated.mean) == len(stated.std) == 3 or min(stated.std) <= 0:
            raise BenchError("--mean and --std: give three values each, with commas, and std above 0")
        return stated.mean, stated.std, "as given"
    if after_layer and (architecture, classes) in _RELEASED:
        data, (mean, std) = _RELEASED[architecture, classes]
        return mean, std, f"of the released normalisation layer for {data}, which stores no tensors"
    layer = "" if after_layer else f" and no normalisation layer before it (prefix {_NORMALISED!r})"
    raise BenchError(
        f"{file}: {architecture} with {classes} classes{layer}: mean and std are not in the file; give --mean and --std"
    )


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:g}" for v in values)


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    values = {f"{name}.{k}": (width,) for k in ("weight", "bias", "running_mean", "running_var")}
    return {**values, f"{name}.{tensors.COUNTER}": ()}


def _empty(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        k: torch.empty(s, device="meta", dtype=torch.long if k.endswith(tensors.COUNTER) else torch.float32)
        for k, s in shapes.items()
    }


# Denoisers and diffusion models ----------------------------------------------------------------------


def _dncnn(file: Path, state: Mapping[str, Tensor]) -> Converted:
    """Rename a DnCNN of denoised smoothing (Salman et al. 2020) as defense denoiser does."""
    new = {re.sub(r"^dncnn\.", "net.", k): v for k, v in state.items()}
    stem = new["net.0.weight"]
    depth = sum(v.ndim == 4 for v in new.values())
    if stem.ndim != 4 or depth < 2:
        raise BenchError(f"{file}: dncnn.0.weight has shape {list(stem.shape)}, not a DnCNN's; check the file")
    width, channels = stem.shape[:2]
    shapes: dict[str, tuple[int, ...]] = {"net.0.weight": (width, channels, 3, 3), "net.0.bias": (width,)}
    for i in range(2, 3 * (depth - 2) + 2, 3):
        shapes |= {f"net.{i}.weight": (width, width, 3, 3), **_norm(f"net.{i + 1}", width)}
    shapes[f"net.{3 * (depth - 2) + 2}.weight"] = (channels, width, 3, 3)
    wanted = _empty(shapes)
    tensors.check(f"{file} is not a DnCNN", wanted, new, {k for k in wanted if k.endswith(tensors.COUNTER)})
    return Converted(
        f"a DnCNN of depth {depth} and width {width} for {channels} channels",
        new,
        notes=["renamed: 'dncnn.' at the start of all names to 'net.'"],
        use="use: bench run --defense denoiser --set objective=... --set weights={out}",
    )


def _diffusion(file: Path, state: Mapping[str, Tensor], flags: str) -> Converted:
    found = convert_diffusion.convert(file, state, flags)
    jsons = {"config.json": found.unet, "scheduler_config.json": found.scheduler}
    scale = "" if found.scale == 1 else f" --set timestep_scale={found.scale:g}"
    use = f"use: bench run --defense diffusion --set unet={{out}}{scale}"
    return Converted(found.what, found.tensors, jsons, found.notes, folder=True, use=use)
