"""The base classifier under defense: pixels in [0, 1] to logits, and what a defense may see of it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cards import Split
from bench.errors import BenchError
from bench.interface import Access

# A view that may only be queried finds its module here by number: nothing reachable from the view
# itself is a module, a parameter or a gradient.
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


class Classifier(nn.Module):
    """A timm model with its resizing and normalisation inside: pixels in [0, 1] to logits.

    ``size`` is the height and width the model takes, None where that is the card's. Noise is added
    at the card's resolution, before this module sees an image, so radii are those of the card.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of pixels x [B, C, H, W]; one grey channel becomes as many as the model takes."""
        if self.size is not None:
            shrinks = self.size[0] < x.shape[-2] or self.size[1] < x.shape[-1]
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=shrinks)
        # A grey image broadcasts over the model's mean and std.
        return cast(Tensor, self.model((x - self.mean) / self.std))

    def head(self) -> nn.Module:
        """The layer that turns features into logits."""
        return cast(nn.Module, self.model.get_classifier())  # type: ignore[operator]


class View:
    """The base as a defense of a given access sees it; satisfies ``interface.Base``."""

    def __init__(self, owner: BaseModel, most: Access) -> None:
        self.classes, self.sha256, self.most = owner.classes, owner.sha256, most
        self.queries = 0
        self._handle = id(owner.module)
        self._untrained = owner.untrained

    def __call__(self, x: Tensor) -> Tensor:
        if self.most < Access.QUERY:
            raise BenchError("the defense declares access = Access.NONE and asks the base; declare Access.QUERY")
        self.queries += len(x)
        if self.most == Access.QUERY:
            with torch.no_grad():
                return cast(Tensor, _modules[self._handle](x))
        return cast(Tensor, _modules[self._handle](x))

    def copy(self, classes: int | None = None) -> nn.Module:
        """A private trainable copy, with a new head where ``classes`` differs. Raises BenchError below WEIGHTS."""
        if self.most < Access.WEIGHTS:
            raise BenchError(f"the defense has {self.most.name} access and copies the base; declare Access.WEIGHTS")
        module = copy.deepcopy(_modules[self._handle]).requires_grad_(True)
        if classes not in (None, self.classes):
            module.model.reset_classifier(classes)  # type: ignore[union-attr,operator]
        return module

    def untrained(self, classes: int) -> nn.Module:
        """The same architecture with fresh weights."""
        return self._untrained(classes)


class BaseModel:
    """A loaded base classifier: the harness's side, which owns the module.

    ``architecture`` is what the tensors do not tell (timm name, arguments, resizing), ``meta`` where
    the weights come from and what making them cost. ``sha256`` covers the architecture and the
    tensors, normalisation among them, so the same classifier has one hash whatever it is called.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        untrained: Callable[[int], nn.Module],
        classes: int,
        meta: dict[str, Any],
        architecture: Mapping[str, Any],
    ) -> None:
        self.name, self.classes, self.meta, self.architecture = name, classes, meta, dict(architecture)
        self.module = module.eval().requires_grad_(False)
        self.untrained = untrained
        self.sha256 = self.current_sha256()
        _modules[id(self.module)] = self.module

    def current_sha256(self) -> str:
        """The hash as the weights are now; another one than ``sha256`` means somebody changed them."""
        return state_sha256(self.module, json.dumps(self.architecture, sort_keys=True))

    def identity(self) -> dict[str, Any]:
        """What a run's identity says of its base."""
        return {"name": self.name, "sha256": self.sha256, **self.architecture}

    @property
    def parameters(self) -> int:
        """How many parameters the base has."""
        return sum(p.numel() for p in self.module.parameters())

    def view(self, access: Access) -> View:
        """The base with no more than ``access``."""
        return View(self, access)

    def accuracy(self, split: Split, indices: list[int]) -> tuple[int, int]:
        """Correct and all of the given clean images."""
        device = next(self.module.parameters()).device
        right = 0
        with torch.inference_mode():
            for part in np.array_split(np.array(indices), max(1, len(indices) // 250)):
                logits = self.module(torch.from_numpy(split.pixels(part)).to(device))
                right += int((logits.argmax(1).cpu().numpy() == split.labels[part]).sum())
        return right, len(indices)


def state_sha256(module: nn.Module, *also: str) -> str:
    """Hash of every tensor of a module, by name."""
    h = hashlib.sha256("|".join(also).encode())
    for key, value in sorted(module.state_dict().items()):
        h.update(f"|{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        h.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
