"""The base classifier under defense, from pixels in [0, 1] to logits, and a defense's restricted view of it."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from bench.data.split import Split
from bench.errors import BenchError, DefenseFault
from bench.interface import Access
from bench.models.resampling import DEFAULT, resample

# A view finds its owner here by number, so no module, parameter or gradient is reachable from the view itself. Only
# weak references are kept.
_owners: WeakValueDictionary[int, BaseModel] = WeakValueDictionary()


class WeightsSource(TypedDict, total=False):
    """The record of where a base's weights come from."""

    kind: Literal["trained here", "untrained", "hub", "file", "served"]
    id: str  # on the hub
    revision: str  # commit on the hub
    file: str
    sha256: str
    remarks: list[str]  # differences between stored and loaded tensors
    normalisation: str  # the file that states mean and std, where the weights' own does
    server: str | None
    server_version: str | None


class Probe(TypedDict):
    """The record of a linear probe."""

    probe: dict[str, Any]  # its schedule
    probe_seconds: float
    probe_validation_clean_accuracy: float  # 0 to 1
    probed_from_classes: int  # number of classes before


Preprocessing = TypedDict(
    "Preprocessing",
    {
        "from": list[int],  # height and width of the card's images
        "size": list[int],  # of the model's input
        "resampling": str | None,  # None: images are not resized
        "resampling_from": str,
        "size_from": str,
        "mean": list[float],
        "std": list[float],
        "normalisation_from": str,
    },
)


class BaseRecord(TypedDict, total=False):
    """The record of a base: the source of its weights, its preprocessing, and its training here."""

    source: WeightsSource
    classes: str  # a remark on the order of its classes
    preprocessing: Preprocessing
    trained_on_classes: list[str]
    schedule: dict[str, Any]  # of the clean training here
    train_seconds: float
    validation_clean_accuracy: float  # 0 to 1
    before_probe: str  # sha256 of the base without its probe
    probe: dict[str, Any]
    probe_seconds: float
    probe_validation_clean_accuracy: float
    probed_from_classes: int


class Classifier(nn.Module):
    """A timm model with resizing and normalisation inside: pixels in [0, 1] to logits.

    ``size`` is the model's input height and width, to which ``interpolation`` resizes; None where it is the card's.
    Noise is added at the card's resolution before this module, so radii refer to the card's images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int] | None = None,
        interpolation: str = DEFAULT,
    ) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.interpolation = interpolation
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, classes] of pixels [B, C, H, W]; grey images are repeated in the model's channels."""
        if self.size is not None:
            x = resample(x, self.size, self.interpolation)
        # A grey image broadcasts over the model's mean and std.
        return cast(Tensor, self.model((x - self.mean) / self.std))

    def heads(self) -> list[nn.Module]:
        """Return the layers from features to logits: one, or two in a model distilled into a second head."""
        found = self.model.get_classifier()  # type: ignore[operator]
        return list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]

    def head(self) -> nn.Module:
        """Return the layer from features to logits. Raises BenchError where there are several."""
        heads = self.heads()
        if len(heads) != 1:
            raise BenchError(
                f"this base ({type(self.model).__name__}) has {len(heads)} heads, not one; give another --base"
            )
        return heads[0]


class BlackBox(nn.Module):
    """A base that only answers queries; its parameters and operations cannot be counted."""


class View:
    """The base as seen by a defense of a given access; satisfies ``interface.Base``."""

    def __init__(self, owner: BaseModel, most: Access) -> None:
        self.classes, self.most = owner.classes, most
        self.queries = 0
        self._handle = id(owner)
        _owners[self._handle] = owner

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is a view of the owner's copy, which the caller must keep: copy (defense, base) together.
        return _view, (_owners[self._handle], self.most, self.queries)

    @property
    def sha256(self) -> str:
        """Hash of the base."""
        return _owners[self._handle].sha256

    def __call__(self, x: Tensor) -> Tensor:
        if self.most < Access.QUERY:
            raise DefenseFault("it declares access = Access.NONE and queries the base; declare Access.QUERY")
        self.queries += len(x)
        if self.most == Access.QUERY:
            with torch.no_grad():
                return cast(Tensor, _owners[self._handle].module(x))
        return cast(Tensor, _owners[self._handle].module(x))

    def copy(self, classes: int | None = None) -> nn.Module:
        """Return a private trainable copy, with a new head where ``classes`` differs.

        Raises DefenseFault below WEIGHTS access.
        """
        if self.most < Access.WEIGHTS:
            raise DefenseFault(f"it declares {self.most.name} access and copies the base; declare Access.WEIGHTS")
        module = copy.deepcopy(_owners[self._handle].module).requires_grad_(True)
        if classes not in (None, self.classes):
            module.model.reset_classifier(classes)  # type: ignore[union-attr,operator]
        return module

    def untrained(self, classes: int) -> nn.Module:
        """Return the same architecture with random weights."""
        return _owners[self._handle].untrained(classes)


def _view(owner: BaseModel, most: Access, queries: int) -> View:
    view = owner.view(most)
    view.queries = queries
    return view


class BaseModel(ABC):
    """A base classifier as the harness sees it; owns ``module``, the map from pixels to logits."""

    meta: BaseRecord
    batch = 250  # images of a forward pass when clean accuracy is measured

    def __init__(self, name: str, classes: int, module: nn.Module) -> None:
        self.name, self.classes = name, classes
        self.module = module.eval().requires_grad_(False)

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of everything known that decides its logits."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the base's part of a run's identity, including name and sha256."""

    @abstractmethod
    def check_unchanged(self, defense: str) -> None:
        """Raise BenchError where the base has changed since it was loaded; ``defense`` has used it meanwhile."""

    @abstractmethod
    def untrained(self, classes: int) -> nn.Module:
        """Return the same architecture with random weights. Raises BenchError where it is unknown."""

    @property
    def untrained_weights(self) -> bool:
        """Whether its weights are random, since the run uses its architecture alone."""
        return self.meta.get("source", {}).get("kind") == "untrained"

    def view(self, access: Access) -> View:
        """Return the base restricted to ``access``."""
        return View(self, access)

    def accuracy(self, split: Split, indices: list[int]) -> tuple[int, int]:
        """Return how many of the given clean images are classified correctly, and how many there are."""
        device = next((p.device for p in self.module.parameters()), None)
        right = 0
        with torch.inference_mode():
            for part in np.array_split(np.array(indices), max(1, -(-len(indices) // self.batch))):
                logits = self.module(torch.from_numpy(split.pixels(part)).to(device))
                right += int((logits.argmax(1).cpu().numpy() == split.labels[part]).sum())
        return right, len(indices)


class LocalBase(BaseModel):
    """A base with local weights.

    ``architecture`` is what the tensors do not determine: timm name, arguments, resizing. ``sha256`` covers it and the
    tensors, including the normalisation, so the same classifier has the same hash whatever its name.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        untrained: Callable[[int], nn.Module],
        classes: int,
        meta: BaseRecord,
        architecture: Mapping[str, Any],
    ) -> None:
        super().__init__(name, classes, module)
        self.meta, self.architecture = meta, dict(architecture)
        self._untrained = untrained
        self._sha256 = self._current_sha256()

    @property
    def sha256(self) -> str:
        """Hash of architecture and tensors when the base was made."""
        return self._sha256

    def _current_sha256(self) -> str:
        return local_sha256(self.module.state_dict(), self.architecture)

    def identity(self) -> dict[str, Any]:
        """Return name, hash and architecture."""
        return {"name": self.name, "sha256": self.sha256, **self.architecture}

    def check_unchanged(self, defense: str) -> None:
        """Raise BenchError where a defense changed the weights."""
        if self._current_sha256() != self.sha256:
            raise BenchError(f"defense {defense} changed the base classifier; train a copy: self.context.base.copy()")

    def untrained(self, classes: int) -> nn.Module:
        """Return the same architecture with random weights."""
        return self._untrained(classes)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.module.parameters())


def local_sha256(tensors: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """Return the hash that identifies a local base: of its architecture, as in a record's identity, and its tensors."""
    return tensors_sha256(tensors, json.dumps(architecture, sort_keys=True))


def state_sha256(module: nn.Module, *also: str) -> str:
    """Return the hash of every tensor of a module, by name."""
    return tensors_sha256(module.state_dict(), *also)


def tensors_sha256(tensors: Mapping[str, Tensor], *also: str) -> str:
    """Return the hash of tensors by name."""
    h = hashlib.sha256("|".join(also).encode())
    for key, value in sorted(tensors.items()):
        h.update(f"|{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        h.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
