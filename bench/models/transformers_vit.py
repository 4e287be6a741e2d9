"""Read ``ViTForImageClassification`` of Hugging Face's transformers as timm's vision transformer of the same function.

Its config.json and preprocessor_config.json become a timm config, and its tensors get timm's names. Everything that has
no counterpart is refused, or left out with a remark where it cannot change a logit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.errors import BenchError, unknown

CLASS = "ViTForImageClassification"
PROCESSOR = "preprocessor_config.json"
ARCHITECTURE = "vit_of_transformers"  # see ``transformers_architecture``
_LARGEST = 2**16  # of a config's numbers, which are untrusted
_FIX = "give another --base, or save the model as timm does"

# transformers' activation -> timm's. gelu_new, gelu_fast and gelu_pytorch_tanh are one formula.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
DEFAULT_FROM = "transformers' default"  # bilinear, of ViTImageProcessor

_PARTS = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "classifier": "head",
}
# Files have the first names, also those that transformers 5 writes; its modules have the second.
_LAYER_PARTS = {
    "attention.attention.query": "attn.q",
    "attention.q_proj": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.k_proj": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.v_proj": "attn.v",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
}
_LAYER = re.compile(r"vit\.(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_UNUSED = re.compile(r"vit\.pooler\..+|vit\.embeddings\.mask_token")  # what ViTForImageClassification has not


class Preprocessor(NamedTuple):
    """What a preprocessor_config.json states."""

    mean: list[float]
    std: list[float]
    size: tuple[int, int] | None  # height and width; None: images are not resized
    interpolation: str  # timm's word; empty: not stated


def recognised(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is transformers' and not timm's."""
    return not isinstance(config.get("architecture"), str) and isinstance(config.get("model_type"), str)


def check_class(base: str, config: Mapping[str, Any]) -> None:
    """Raise BenchError where a config.json is of another model."""
    kind, classes = config.get("model_type"), config.get("architectures") or [CLASS]
    if kind != "vit" or not isinstance(classes, list) or CLASS not in classes:
        found = ", ".join(map(str, classes)) if isinstance(classes, list) else str(classes)
        raise BenchError(
            f"{base}: its config.json is of transformers' {kind!s:.40} ({found:.80}); of these models only {CLASS} can "
            f"be read; {_FIX}"
        )


def timm_config(base: str, config: Mapping[str, Any], processor: Preprocessor) -> dict[str, Any]:
    """Return the timm config of a model, from its config.json and preprocessor. Raises BenchError for an odd value."""
    width, heads = _whole(base, config, "hidden_size", 768), _whole(base, config, "num_attention_heads", 12)
    if width % heads or config.get("head_dim", width // heads) != width // heads:
        raise BenchError(f"{base}: hidden_size {width} is not {heads} attention heads of one size; {_FIX}")
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise BenchError(f"{base}: hidden_act in its config: {unknown('activation', str(activation), _ACTIVATIONS)}")
    size = _sides(base, "image_size", config.get("image_size", 224))
    if processor.size not in (None, size):
        resized, own = ("x".join(map(str, sides)) for sides in (processor.size or size, size))
        raise BenchError(
            f"{base}: {PROCESSOR} resizes images to {resized}, and image_size in its config.json is {own}, which the "
            f"model refuses; correct one of them"
        )
    wide = _whole(base, config, "intermediate_size", 3072)
    ratio = wide / width
    args = {
        "img_size": list(size),
        "patch_size": list(_sides(base, "patch_size", config.get("patch_size", 16))),
        "in_chans": _whole(base, config, "num_channels", 3),
        "embed_dim": width,
        "depth": _whole(base, config, "num_hidden_layers", 12),
        "num_heads": heads,
        # timm rounds the product down.
        "mlp_ratio": ratio if int(width * ratio) == wide else (wide + 0.5) / width,
        "qkv_bias": config.get("qkv_bias", True) is True,
        "act_layer": _ACTIVATIONS[activation],
        "norm_eps": _number(base, "layer_norm_eps", config.get("layer_norm_eps", 1e-12)),
    }
    return {
        "architecture": ARCHITECTURE,
        "model_args": args,
        "num_classes": _classes(base, config),
        "id2label": config.get("id2label"),
        "label2id": config.get("label2id"),
        "pretrained_cfg": {
            "mean": processor.mean,
            "std": processor.std,
            "input_size": [args["in_chans"], *size],
            "interpolation": processor.interpolation or "bilinear",
        },
    }


def _classes(base: str, config: Mapping[str, Any]) -> int:
    """Return the number of logits; transformers writes neither of the two for its default, 2."""
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        return len(names)
    return _whole(base, config, "num_labels", 2)


def read_processor(base: str, config: Mapping[str, Any]) -> Preprocessor | None:
    """Read a preprocessor_config.json; None where it states no mean and std.

    Raises BenchError where it prepares images in a way that certbench does not.
    """
    where = f"{base}: {PROCESSOR}"
    factor = _number(where, "rescale_factor", config.get("rescale_factor", 1 / 255))
    if config.get("do_rescale") is False or not math.isclose(factor, 1 / 255, rel_tol=1e-5):
        raise BenchError(f"{where}: does not scale pixels by 1/255, as certbench does; {_FIX}")
    mean, std = config.get("image_mean"), config.get("image_std")
    if config.get("do_normalize") is False:
        mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    if mean is None or std is None:
        return None
    if not isinstance(mean, list) or not isinstance(std, list):
        raise BenchError(f"{where}: image_mean and image_std must be lists; correct it")
    means = [_number(where, "image_mean", v) for v in mean]
    deviations = [_number(where, "image_std", v) for v in std]
    size = config.get("crop_size") if config.get("do_center_crop") is True else config.get("size")
    if config.get("do_resize") is False or size is None:
        return Preprocessor(means, deviations, None, "")
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")] if "height" in size else size.get("shortest_edge")
    resample = config.get("resample")
    if resample is not None and (not isinstance(resample, int) or resample not in _RESAMPLING):
        raise BenchError(f"{where}: resample {resample!s:.40} is not one of Pillow's filters, 0 to 5; correct it")
    interpolation = "" if resample is None else _RESAMPLING[resample]
    return Preprocessor(means, deviations, _sides(where, "size", size), interpolation)


def renamed(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under timm's names, query, key and value as one, and a remark on those left out.

    A tensor without a counterpart keeps its name, so that loading refuses it.
    """
    found: dict[str, Tensor] = {}
    unused = sorted(key for key in stored if _UNUSED.fullmatch(key))
    for key, value in stored.items():
        if key not in unused:
            found[_renamed(key)] = value
    for key in [key for key in found if ".attn.q." in key]:
        parts = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in found for part in parts) and len({found[part].shape[1:] for part in parts}) == 1:
            found[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat([found.pop(part) for part in parts])
    more = ", ..." if len(unused) > 1 else ""
    return found, [f"left out, since {CLASS} does not use it: {unused[0]}{more}"] if unused else []


def dropout(config: Mapping[str, Any]) -> list[str]:
    """Return a remark where the model was trained with dropout, which training here leaves out."""
    rates = [key for key in ("hidden_dropout_prob", "attention_probs_dropout_prob") if config.get(key) not in (None, 0)]
    return [f"training here does not use its {' and '.join(rates)}"] if rates else []


def _renamed(key: str) -> str:
    if (layer := _LAYER.fullmatch(key)) and layer[2] in _LAYER_PARTS:
        return f"blocks.{layer[1]}.{_LAYER_PARTS[layer[2]]}.{layer[3]}"
    part, _, kind = key.rpartition(".")
    return _PARTS.get(key) or (f"{_PARTS[part]}.{kind}" if part in _PARTS else key)


def _whole(base: str, config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not _is_whole(value):
        must = f"must be a whole number, 1 to {_LARGEST}; correct it"
        raise BenchError(f"{base}: {key} {value!s:.40} in its config {must}")
    return int(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _number(base: str, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise BenchError(f"{base}: {key} {value!s:.40} must be a number; correct it")
    return float(value)


def _sides(base: str, key: str, value: Any) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list) or len(sides) != 2 or not all(map(_is_whole, sides)):
        raise BenchError(f"{base}: {key} {value!s:.40} must be a side in pixels, or a height and a width; correct it")
    return sides[0], sides[1]
