"""Clean training of base classifiers: the keys of a recipe's schedule, and its loss. Augmentations are timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from bench.interface import Draw, Schedule
from bench.training import bfloat16

# Magnitude, number of operations, whether severity increases with magnitude; deviation and maximum of the magnitude.
_RANDAUGMENT = r"rand(-(m|n|inc)\d+|-(mstd|mmax|p)\d+(\.\d+)?)*"
_INHERITED = {f.name for f in fields(Schedule)}
VERSION = 2  # raise it whenever weights trained with a key of CleanSchedule's own would change


@dataclass(frozen=True)
class CleanSchedule(Schedule):
    """The schedule of a recipe. Its own keys are off by default; then the loss is ``objectives.clean``."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # timm's notation, after the card's crop and flip. The pattern is strict, since timm ignores what it cannot read.
    randaugment: Annotated[str, Field(pattern=rf"^({_RANDAUGMENT})?$")] = ""
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of the Beta distribution of the weights; 0: off
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # the same; with both, each batch takes one of them at random
    clip_grad: Annotated[float, Field(ge=0)] = 0.0  # maximum l2 norm of the gradient; 0: none
    arithmetic: Literal["float32", "bfloat16"] = "float32"  # bfloat16: of the forward pass, by autocast

    def identity(self) -> dict[str, Any]:
        """Return what decides the weights, as JSON. Own keys at their default are left out, as before they existed."""
        kept = [f.name for f in fields(self) if f.name in _INHERITED or getattr(self, f.name) != f.default]
        return {name: getattr(self, name) for name in kept}

    def own(self) -> dict[str, Any]:
        """Return the keys of this class that are not at their default."""
        return {k: v for k, v in self.identity().items() if k not in _INHERITED}


def loss(
    module: nn.Module, schedule: CleanSchedule, classes: int, mean: tuple[float, ...]
) -> Callable[[Tensor, Tensor, Draw], Tensor]:
    """Return the training loss of ``module``; it draws its augmentations from the global random states.

    Args:
        module: From pixels in [0, 1] to logits.
        schedule: The recipe's.
        classes: Number of logits.
        mean: Mean pixel of each channel, with which RandAugment fills what it moves into the image.
    """
    from timm.data import Mixup

    augment = randaugment(schedule.randaugment, mean) if schedule.randaugment else None
    smoothing, rounded = schedule.label_smoothing, schedule.arithmetic == "bfloat16"
    mix = None
    if schedule.mixup or schedule.cutmix:
        mix = Mixup(  # type: ignore[no-untyped-call]
            schedule.mixup, schedule.cutmix, label_smoothing=0.0, num_classes=classes
        )

    def of(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        if augment is not None:
            x = augment(x)
        target: Tensor = y
        if mix is not None:
            x, target = mix(x, y)
        if not rounded:
            logits = module(x)
        else:
            with bfloat16.passes(module, x) as images:
                logits = module(images)
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    return of


def randaugment(config: str, mean: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """Return timm's RandAugment (Cubuk et al. 2019, arXiv 1909.13719) for pixels k/255 [B, 1 or 3, H, W]."""
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * m) for m in mean)

    def augment(x: Tensor) -> Tensor:
        # As timm's own training: translations of up to .45 of the side.
        settings = {"translate_const": int(0.45 * min(x.shape[-2:])), "img_mean": fill if x.shape[1] == 3 else fill[0]}
        transform = rand_augment_transform(config, settings)
        integers = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(i if i.shape[2] == 3 else i[:, :, 0]) for i in integers]
        after = np.stack([np.asarray(transform(p)).reshape(integers.shape[1:]) for p in pictures])
        return torch.from_numpy(after).to(x.device).permute(0, 3, 1, 2).float().div(255).contiguous()

    return augment
