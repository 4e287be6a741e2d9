"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) by the package grad-cam, and how two maps overlap."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.errors import BenchError

TOP = 0.2  # share of the pixels whose overlap is measured
Map = NDArray[np.float32]  # [H, W], from 0 to 1


class NoMap(Exception):
    """A model that has no Grad-CAM, and the reason."""


@dataclass(frozen=True)
class Target:
    """The layer whose output Grad-CAM weighs."""

    layer: nn.Module
    name: str
    size: tuple[int, int]  # of its grid of positions
    reshape: Callable[[Tensor], Tensor] | None  # its output to [B, channels, height, width]; None: it is that already


def require_package() -> None:
    """Raise BenchError where the package grad-cam is not installed."""
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        raise BenchError("bench inspect needs the package grad-cam; pip install 'certbench[inspect]'")


def seen_by(candidates: Sequence[nn.Module], compute: Callable[[], object]) -> tuple[nn.Module, Tensor]:
    """Return the one candidate that ``compute`` calls, and the pixels that it is given.

    Raises NoMap where none is called, several are, or one is called more than once.
    """
    calls: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as hooks:
        for module in candidates:
            handle = module.register_forward_pre_hook(lambda m, inputs: calls.append((m, inputs[0].detach())))
            hooks.callback(handle.remove)
        compute()
    if not calls:
        raise NoMap("its logits are not those of a base classifier or a copy of one")
    if len(calls) > 1:
        raise NoMap(f"it classifies each image {len(calls)} times, so there is no one map")
    return calls[0]


def target_of(model: nn.Module, compute: Callable[[], object]) -> Target:
    """Choose the layer: before a vision transformer's last attention, or a convnet's last stage.

    The last stage is the last of the model's direct children with a convolution inside whose output has more than one
    position. Raises NoMap for other models.

    Args:
        model: A timm model.
        compute: Passes an image through it.
    """
    blocks = [(name, m) for name, m in model.named_modules() if hasattr(m, "norm1") and hasattr(m, "attn")]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if blocks and grid is not None:
        name, block = blocks[-1]
        return _before_attention(f"{name}.norm1", block.norm1, (int(grid[0]), int(grid[1])), compute)
    if any(name.rpartition(".")[2] in ("attn", "attention") for name, _ in model.named_modules()):
        raise NoMap(
            f"{type(model).__name__} has attention without a grid of patches; only ViTs and convnets have a map"
        )
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    with ExitStack() as hooks:
        for name, child in model.named_children():
            if any(isinstance(m, nn.Conv2d) for m in child.modules()):
                _watch(hooks, name, child, outputs)
        compute()
    maps = [(n, m, out) for n, m, out in outputs if out.ndim == 4 and out.shape[2] * out.shape[3] > 1]
    if not maps:
        raise NoMap(f"{type(model).__name__} has no stage of convolutions whose output has more than one position")
    name, layer, out = maps[-1]
    return Target(layer, name, (out.shape[2], out.shape[3]), None)


def _before_attention(name: str, norm: nn.Module, grid: tuple[int, int], compute: Callable[[], object]) -> Target:
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    with ExitStack() as hooks:
        _watch(hooks, name, norm, outputs)
        compute()
    if len(outputs) != 1 or outputs[0][2].ndim not in (3, 4):
        raise NoMap(f"its layer {name} does not have one output of tokens")
    out = outputs[0][2]
    if out.ndim == 4:  # windows of tokens, as in Swin: [B, height, width, channels]
        return Target(norm, name, (out.shape[1], out.shape[2]), lambda tokens: tokens.permute(0, 3, 1, 2))
    height, width = grid
    if out.shape[1] < height * width:
        raise NoMap(f"its layer {name} has {out.shape[1]} tokens, fewer than the {height * width} patches")

    def reshape(tokens: Tensor) -> Tensor:
        # Class token, registers and prompts are before the patches.
        return tokens[:, -height * width :].transpose(1, 2).reshape(len(tokens), -1, height, width)

    return Target(norm, name, grid, reshape)


def _watch(hooks: ExitStack, name: str, module: nn.Module, outputs: list[tuple[str, nn.Module, Tensor]]) -> None:
    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((name, module, output.detach()))

    hooks.callback(module.register_forward_hook(record).remove)


def maps(classifier: nn.Module, target: Target, x: Tensor, label: int) -> list[Map]:
    """Return the Grad-CAM of the label for each image.

    Args:
        classifier: Pixels [B, C, H, W] to logits; in eval mode.
        target: A layer of it.
        x: What the classifier is given.
        label: The class whose logit is explained.

    Returns:
        A map [H, W] an image, enlarged to it bilinearly. Each is scaled to its own range, from 0 to 1; all 0 where
        nothing speaks for the class.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = GradCAM(model=classifier, target_layers=[target.layer], reshape_transform=target.reshape)
    try:
        with torch.enable_grad():
            # Weights are frozen, so gradients start at the pixels.
            found = cam(
                input_tensor=x.detach().clone().requires_grad_(), targets=[ClassifierOutputTarget(label)] * len(x)
            )
    finally:
        cam.activations_and_grads.release()
    return [np.asarray(one, np.float32) for one in found]


def overlap(a: Map, b: Map) -> tuple[float, float]:
    """Return the intersection over union of the highest pixels of two maps, and the correlation of all pixels.

    The highest are the top 20%, of those above 0; of equal pixels the first. NaN where a map is constant.
    """
    if a.min() == a.max() or b.min() == b.max():
        return math.nan, math.nan
    top_a, top_b = _top(a), _top(b)
    return float((top_a & top_b).sum() / (top_a | top_b).sum()), float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _top(one: Map) -> NDArray[np.bool_]:
    count = math.ceil(TOP * one.size)
    chosen = np.zeros(one.size, bool)
    chosen[np.argsort(-one.ravel(), kind="stable")[:count]] = True
    return chosen & (one.ravel() > 0)
