"""Weights of linear and convolution layers in bfloat16, rounded once instead of by autocast in every block.

Autocast keeps no copy of a weight without gradient, so in a block of votes it rounds all weights again. The copies
here have the same bits and go to the same operations. They take half the memory of the float32 weights, which stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Layers whose forward gives their weight and bias to one operation, unchanged. A subclass with a forward of its own,
# such as weight standardisation, computes with float32 weights first, so it is left to autocast.
_FORWARDS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class RoundedWeights:
    """Copies of weights, shared by all models that share the weights."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return RoundedWeights, ()  # made again from the weights of the copy

    def of(self, weight: Tensor) -> Tensor:
        """Return the weight in bfloat16: the copy that another model uses, where it has the same bits."""
        # Not in inference mode, since a defense may differentiate its logits by the pixels.
        with torch.inference_mode(False), torch.no_grad():
            rounded = weight.detach().to(torch.bfloat16)
        held = self._held.setdefault(id(weight), rounded)
        alike = held.device == rounded.device and held.stride() == rounded.stride() and torch.equal(held, rounded)
        return held if alike else rounded


class RoundedLayers:
    """The layers below some modules that use the rounded copies while ``used`` lasts.

    Only a layer's own forward is replaced, so code that reads ``layer.weight`` finds float32, as with autocast alone.
    """

    def __init__(self, modules: Iterable[nn.Module], weights: RoundedWeights, device: torch.device) -> None:
        layers = dict.fromkeys(layer for module in modules for layer in module.modules() if _plain(layer))
        self._forwards = [(vars(layer), _forward(layer, weights, device.type)) for layer in layers]

    def __len__(self) -> int:
        return len(self._forwards)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the copies. The modules may belong to other runs, so they are left as they were."""
        for attributes, forward in self._forwards:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self._forwards:
                # A module whose copy is itself is shared by threads; without the copies it gives the same bits.
                attributes.pop("forward", None)


def _plain(layer: nn.Module) -> bool:
    """Return whether a layer's weight and bias are parameters of its own, used by autocast alone."""
    if type(layer).forward not in _FORWARDS or "forward" in vars(layer):
        return False
    weight, bias = (layer._parameters.get(name, Tensor()) for name in ("weight", "bias"))  # computed ones: an empty one
    return all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in (weight, bias) if p is not None)


def _forward(layer: nn.Module, weights: RoundedWeights, kind: str) -> Callable[[Tensor], Tensor]:
    usual: Callable[[Tensor], Tensor] = layer.forward
    operation: Any = functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward
    bias = layer.bias
    rounded = weights.of(layer.weight), None if bias is None else weights.of(bias)  # type: ignore[arg-type]

    def forward(input: Tensor) -> Tensor:
        # A defense may turn autocast off for a part of its layers.
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            out: Tensor = operation(input, *rounded)
            return out
        return usual(input)

    return forward
