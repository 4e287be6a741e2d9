"""UNets of diffusion and consistency models, in diffusers' layout, from folders and the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from bench.errors import BenchError
from bench.interface import Context
from bench.io import tensors
from bench.io.hub import MissingFile
from bench.training.denoising import CONSISTENCY

UNET: Any = diffusers.UNet2DModel  # Any, since diffusers' decorators hide its types
WEIGHTS = "diffusion_pytorch_model"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
FURTHEST = 4  # most times that images may be larger or smaller than those of the network's training
# Names of attention layers in diffusers before 0.13, when google/ddpm-cifar10-32 was published, and now.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load(context: Context, source: str) -> tuple[nn.Module, Any]:
    """Load a frozen UNet and its scheduler from a folder or the hub, in diffusers' layout. Raises BenchError."""
    config, name = _first_json(context, source, "config.json", "unet/config.json")
    plan, _ = _first_json(context, source, "scheduler_config.json", "scheduler/scheduler_config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel" or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise BenchError(f"diffusion: unet={source} is a {kind}; give an unconditional UNet2DModel")
    unet = UNET.from_config(config, dropout=0.0)  # never trained here, even in training mode
    _check_shape(context, source, unet)
    maker: Any = getattr(diffusers, str(plan.get("_class_name")), None)
    scheduler = maker.from_config(plan) if str(plan.get("_class_name")).endswith("Scheduler") and maker else None
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    known = hasattr(scheduler, "alphas_cumprod") and prediction in PREDICTIONS
    if not known and type(scheduler).__name__ != CONSISTENCY:
        raise BenchError(
            f"diffusion: unet={source}: its scheduler {plan.get('_class_name')} (predicting {prediction}) is not "
            f"supported; use one with alphas_cumprod that predicts {', '.join(PREDICTIONS)}, or {CONSISTENCY}"
        )
    stem = name.removesuffix("config.json") + WEIGHTS
    try:
        stored, file = tensors.read_stored(stem, lambda name: context.hub(source, name))
    except MissingFile:
        there = sorted(f.name for f in (Path(source) / stem).parent.glob("*.safetensors"))
        if there:  # another variant (non_ema) may hold other weights
            fix = f"it has {', '.join(there)}: save the right one as {stem}.safetensors"
        else:
            fix = (
                "a pickled .bin is refused, since reading it can run hidden code; if you trust it, load it and call "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise BenchError(
            f"diffusion: unet={source} has no {stem}.safetensors, no shards and no fp16 or bf16 variant of it; {fix}"
        ) from None
    state = stored.tensors
    for old, new in RENAMED.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    tensors.check(f"diffusion: {file} does not fit its config.json", unet.state_dict(), state)
    unet.load_state_dict(state)
    if kinds := sorted({str(v.dtype).removeprefix("torch.") for v in state.values()} - {"float32"}):
        context.note(f"diffusion: {file} of unet={source} is stored as {' and '.join(kinds)}, computed in float32")
    return unet.eval().requires_grad_(False), scheduler


def _check_shape(context: Context, source: str, unet: Any) -> None:
    """Raise BenchError where the UNet does not fit the images; note another size than that of its training."""
    channels, size = unet.config.in_channels, unet.config.sample_size or context.shape[1:]
    shape = (channels, *((size, size) if isinstance(size, int) else size))
    theirs, ours = ("x".join(map(str, s)) for s in (shape, context.shape))
    problem = f"diffusion: unet={source} is for {theirs} images, the data are {ours}"
    fix = "--set unet= trains one here"
    if channels != context.shape[0] or unet.config.out_channels not in (channels, 2 * channels):
        raise BenchError(f"{problem}; {fix}")
    if shape == context.shape:
        return
    sides = [*zip(shape[1:], context.shape[1:], strict=True)]
    step = 2 ** (len(unet.config.block_out_channels) - 1)  # every block but the last halves the sides
    if any(side % step for _, side in sides):
        raise BenchError(f"{problem}, and its down-samplings need sides that {step} divides; {fix}")
    if any(max(pair) > FURTHEST * min(pair) for pair in sides):
        raise BenchError(f"{problem}, a size more than {FURTHEST} times another; {fix}")
    context.note(f"{problem}: it is used at another size than it was trained at")


def _first_json(context: Context, source: str, *names: str) -> tuple[dict[str, Any], str]:
    """Read the first of the files that is available; return its object and name. Raises BenchError."""
    failed: list[BenchError] = []
    for name in names:
        try:
            path = context.hub(source, name)
            return json.loads(path.read_text()), name
        except BenchError as e:  # not only MissingFile: offline, a missing file cannot be recognised
            failed.append(e)
        except ValueError:
            raise BenchError(f"diffusion: {path} is not JSON; save the model again") from None
    missing = BenchError(f"diffusion: unet={source} has neither {' nor '.join(names)}; give a diffusers model")
    raise next((e for e in failed if not isinstance(e, MissingFile)), missing)
