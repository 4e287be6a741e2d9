"""What the author of a defense imports: the Defense class and the objects the harness hands to it.

A defense owns two things, how it trains and the map from noisy pixels to logits. Everything else
(data, base classifier, noise, votes, statistics, seeds, caching, records) is the harness's, so a
defense can neither bend its certificate nor forget to measure itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn


class Access(IntEnum):
    """What a defense needs of the base classifier's trained weights."""

    NONE = 0
    QUERY = 1
    GRADIENT = 2
    WEIGHTS = 3


class Draw(Protocol):
    """The randomness of one batch. Each row has its own key, so a row's draws do not depend on its batch."""

    sigma: float

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise of shape [B, *shape], new at every call."""
        ...


class Base(Protocol):
    """The classifier under defense: frozen, from pixels in [0, 1] (noisy and unclipped allowed) to logits.

    It is a callable and no module: a defense that may only query it holds no weights of it.
    """

    classes: int
    sha256: str
    most: Access

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of x [B, C, H, W]: detached for QUERY access, differentiable in x for GRADIENT."""
        ...

    def copy(self, classes: int | None = None) -> nn.Module:
        """A private trainable copy (WEIGHTS access), normalisation inside; a new head where ``classes`` differs."""
        ...

    def untrained(self, classes: int) -> nn.Module:
        """The same architecture with fresh weights (any access)."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of one gradient training run; the ``Config`` of a trained defense extends it."""

    epochs: float = 20.0
    batch: int = 128
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.01
    decay: Literal["cosine", "step"] = "cosine"  # step: x0.1 after each third of the epochs
    warmup: float = 0.0  # the part of the run in which lr rises linearly from 0


Loss = Callable[[Tensor, Tensor, Draw], Tensor]
Logits = Callable[[Tensor, Draw], Tensor]
Objective = Callable[[Logits, Tensor, Tensor, Draw], Tensor]


class Job(Protocol):
    """One resumable training run on the card's training split, at noise level ``sigma``."""

    @property
    def sigma(self) -> float: ...

    @property
    def objective(self) -> Objective:
        """(logits, clean x, y, draw) -> loss; adds the noise itself."""
        ...

    def train(self, module: nn.Module, loss: Loss, schedule: Schedule) -> None:
        """Minimise ``loss(clean x, y, draw)`` over the parameters of ``module`` that require a gradient."""
        ...


@dataclass(frozen=True)
class Context:
    """Everything needed to rebuild a defense: its base classifier and the shape of its task."""

    base: Base
    classes: int
    shape: tuple[int, int, int]  # channels, height, width
    train_sigma: float


class Defense(nn.Module):
    """Base class of every defense. A plug-in must write ``logits``; the rest has defaults.

    The harness constructs it with the random state fixed, calls ``fit``, stores what changed, then
    ``merge``, and from there on treats ``logits`` as a fixed function of one noisy image.
    """

    access: ClassVar[Access] = Access.WEIGHTS
    family: ClassVar[str] = "other"
    paper: ClassVar[str] = ""  # arXiv id
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # named values of Config: quick, standard, paper

    @dataclass(frozen=True)
    class Config:
        """Every hyperparameter; ``--set key=value`` overrides one."""

    def __init__(self, context: Context, config: Any) -> None:
        super().__init__()
        self.context = context
        self.config = config
        self.build()

    @classmethod
    def needs(cls, config: Any) -> Access:
        """The access this configuration needs; checked against what the base offers before anything loads."""
        return cls.access

    def build(self) -> None:
        """Make submodules, untrained; requires_grad says what will be trained."""

    def fit(self, job: Job) -> None:
        """Train. The default minimises ``loss`` over all that requires a gradient; nothing does: nothing happens."""
        if any(p.requires_grad for p in self.parameters()):
            job.train(self, lambda x, y, draw: self.loss(x, y, draw, job), self.config)

    def loss(self, x: Tensor, y: Tensor, draw: Draw, job: Job) -> Tensor:
        """The training loss of clean pixels ``x``; the default is the job's objective on ``logits``."""
        return job.objective(self.logits, x, y, draw)

    def merge(self) -> None:
        """Fold adapters into their layers; called once after fit or load."""

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        """Logits [B, classes] of noisy, unclipped pixels x [B, C, H, W]: a function of each image alone.

        A randomised defense takes its randomness from ``draw``, whose rows are keyed by vote.
        """
        raise NotImplementedError(f"{type(self).__name__} must write logits(self, x, draw)")

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        """``logits`` with its result checked; what the harness calls. Raises ValueError on a wrong result."""
        out = self.logits(x, draw)
        wanted = (x.shape[0], self.context.classes)
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != wanted or not out.is_floating_point():
            got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"logits must return a float tensor of shape {wanted}, not {got}")
        return out
