"""Training in bfloat16: forward passes by autocast; weights, losses and the optimizer's state stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bench.interface import Draw, Logits, Objective, StepDraw

VERSION = (
    1  # raise it, and that of ``clean``, whenever weights trained in bfloat16 would change: part of their identity
)


@contextmanager
def passes(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Compute what is inside in bfloat16; yield the images ``x`` [B, C, H, W] in the layout that is quick for it.

    On a CPU images are laid out channels last, and timm's attentions in ``module`` are multiplied out instead of one
    fused call, whose backward pass takes 40% of a step (tests/perf/test_clean.py).
    """
    on_cpu = x.device.type == "cpu"
    fused = [m for m in module.modules() if on_cpu and getattr(m, "fused_attn", False)]
    for attention in fused:
        attention.fused_attn = False  # type: ignore[assignment]
    try:
        # No cache of casts: one made where gradients are off, as in an attack, would leave its weights without any.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            yield x.contiguous(memory_format=torch.channels_last) if on_cpu and x.ndim == 4 else x
    finally:
        for attention in fused:
            attention.fused_attn = True  # type: ignore[assignment]


def logits_alone(objective: Objective) -> Objective:
    """Return the objective that, inside ``passes``, computes its logits in bfloat16 and all else in float32."""

    def rounded(logits: Logits, x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return objective(logits, x, y, draw)

        def of(images: Tensor, draws: Draw) -> Tensor:
            with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
                return logits(images, draws).float()

        with torch.autocast(kind, enabled=False):
            return objective(of, x, y, draw)

    return rounded
