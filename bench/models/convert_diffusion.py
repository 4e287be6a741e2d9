"""Convert checkpoints of improved-diffusion and guided-diffusion to diffusers' layout.

Both train one kind of UNet (Nichol and Dhariwal 2021, arXiv 2102.09672; Dhariwal and Nichol 2021, arXiv 2105.05233).
The file does not tell the number of attention heads, the noise schedule or the image size, so the flags with which the
authors published it are needed; the tensors must then fit them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bench.errors import BenchError
from bench.io import tensors
from bench.models.diffusion_flags import Structure, published

WEIGHTS = "diffusion_pytorch_model"
_GROUPS = 32  # of every group norm in both repositories


@dataclass(frozen=True)
class Diffusion:
    """A UNet and its schedule in diffusers' layout."""

    what: str
    tensors: dict[str, Tensor]
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    notes: list[str]
    scale: float  # by which the network's timesteps are multiplied


def convert(file: Path, state: Mapping[str, Tensor], flags: str) -> Diffusion:
    """Convert the tensors of a checkpoint. Raises BenchError where flags are missing or do not fit."""
    import diffusers  # takes seconds

    if "label_emb.weight" in state:
        raise BenchError(
            f"{file}: label_emb.weight: a class-conditional diffusion model; the defense needs an unconditional one"
        )
    found = published(file, flags)
    net, steps = found.net, found.steps
    renamed = _renamed(file, net, state)
    unet, made = _unet(net), cast(Any, diffusers.UNet2DModel)
    with torch.device("meta"):  # shapes without memory
        wanted = made.from_config(unet).state_dict()
    tensors.check(f"{file} does not fit its --flags", wanted, renamed)
    betas: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if found.schedule == "linear":
        betas = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        **betas,
        "clip_sample": True,
        "prediction_type": "sample" if found.clean else "epsilon",
        "variance_type": "learned_range" if net.out == 6 else "fixed_large",
    }
    notes = [
        f"attention: heads of {net.head} channels ({'as stated' if found.heads_stated else '4 heads, the default'}); "
        f"qkv is reordered and split",
        f"schedule: {found.schedule}, {steps:,} steps, predicts the {'clean image' if found.clean else 'noise'}",
        f"timesteps: {'as they are' if found.scale == 1 else f'multiplied by 1000 / {steps} = {found.scale:g}'}",
        "renamed: all tensors, to diffusers' names",
    ]
    if net.out == 6:
        notes.append("learned variance: kept; the defense uses the first half of the output channels")
    count = sum(v.numel() for v in renamed.values())
    what = f"a diffusion UNet for 3x{net.size}x{net.size} images, {count:,} parameters"
    return Diffusion(what, renamed, unet, scheduler, notes, found.scale)


# Tensors ---------------------------------------------------------------------------------------------


def _unet(net: Structure) -> dict[str, Any]:
    """Return the config of diffusers' UNet2DModel."""
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if net.resnet_sampling else ("DownBlock2D", "UpBlock2D")
    )
    sampling = "resnet" if net.resnet_sampling else "conv"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": net.size,
        "in_channels": 3,
        "out_channels": net.out,
        "block_out_channels": [m * net.channels for m in net.mult],
        "layers_per_block": net.blocks,
        "down_block_types": ["AttnDownBlock2D" if here else plain[0] for here in net.attention],
        "up_block_types": ["AttnUpBlock2D" if here else plain[1] for here in reversed(net.attention)],
        "downsample_type": sampling,
        "upsample_type": sampling,
        "attention_head_dim": net.head,
        "norm_num_groups": _GROUPS,
        # Without it the middle block's attention has no norm where the timestep scales and shifts.
        "attn_norm_num_groups": _GROUPS,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
    }


def _parts(net: Structure) -> Iterator[tuple[str, str, str]]:
    """Yield the published name of each part, diffusers' name, and its kind: resnet, attention, or plain."""
    yield "time_embed.0", "time_embedding.linear_1", "plain"
    yield "time_embed.2", "time_embedding.linear_2", "plain"
    yield "input_blocks.0.0", "conv_in", "plain"
    number, last = 1, len(net.mult) - 1
    for level, attention in enumerate(net.attention):
        for i in range(net.blocks):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}", "resnet"
            if attention:
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}", "attention"
            number += 1
        if level < last:
            here = f"down_blocks.{level}.downsamplers.0"
            if net.resnet_sampling:
                yield f"input_blocks.{number}.0", here, "resnet"
            else:
                yield f"input_blocks.{number}.0.op", f"{here}.conv", "plain"
            number += 1
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "resnet"
    number = 0
    for level, attention in enumerate(reversed(net.attention)):
        for i in range(net.blocks + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}", "resnet"
            if attention:
                yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{i}", "attention"
            number += 1
        if level < last:
            there, here = f"output_blocks.{number - 1}.{1 + attention}", f"up_blocks.{level}.upsamplers.0"
            if net.resnet_sampling:
                yield there, here, "resnet"
            else:
                yield f"{there}.conv", f"{here}.conv", "plain"
    yield "out.0", "conv_norm_out", "plain"
    yield "out.2", "conv_out", "plain"


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _renamed(file: Path, net: Structure, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under diffusers' names. Raises BenchError naming the first that the flags do not describe."""
    renamed: dict[str, Tensor] = {}
    left = dict(state)

    def take(name: str, new: str) -> None:
        for end in ("weight", "bias"):
            if (value := left.pop(f"{name}.{end}", None)) is not None:
                renamed[f"{new}.{end}"] = value

    for name, new, kind in _parts(net):
        if kind == "resnet":
            for old, part in _RESNET.items():
                take(f"{name}.{old}", f"{new}.{part}")
        elif kind == "plain":
            take(name, new)
        else:
            take(f"{name}.norm", f"{new}.group_norm")
            for end in ("weight", "bias"):
                qkv = left.pop(f"{name}.qkv.{end}", None)
                out = left.pop(f"{name}.proj_out.{end}", None)
                if qkv is None or out is None or len(qkv) % (3 * net.head):
                    raise BenchError(f"{file} does not fit its --flags: no attention with its heads at {name}")
                for letter, value in zip("qkv", _split(net, qkv), strict=True):
                    renamed[f"{new}.to_{letter}.{end}"] = value
                renamed[f"{new}.to_out.0.{end}"] = _flat(out)
    if left:
        first = re.sub(r"\.[^.]+$", "", next(iter(left)))
        raise BenchError(f"{file} does not fit its --flags: they describe no {first}, which the file has")
    return renamed


def _split(net: Structure, qkv: Tensor) -> list[Tensor]:
    """Return the rows of q, k and v, which are stored a head after another, or one after another."""
    if net.split_heads_last:
        return [_flat(part) for part in qkv.chunk(3)]
    heads = qkv.reshape(-1, 3, net.head, *qkv.shape[1:])
    return [_flat(heads[:, i].flatten(0, 1)) for i in range(3)]


def _flat(value: Tensor) -> Tensor:
    """Turn a convolution over positions, [out, in, 1], into a linear layer's weight; copy."""
    return (value.squeeze(2) if value.ndim == 3 else value).contiguous().clone()
