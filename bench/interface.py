"""What the author of a defense imports: the Defense class and the objects the harness hands to it.

A defense owns two things, how it trains and the map from noisy pixels to logits. Everything else
(data, base classifier, noise, votes, statistics, seeds, caching, records) is the harness's.

A certificate is true only where ``logits`` is one fixed function of one noisy image (and of the row's own draws). The
harness refuses what it sees depend on other rows, threads, earlier calls, the process or the noise's keys, and tests
certificates on fresh noise. It cannot exclude a defense that attacks the process it runs in:
docs/certification.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from bench.errors import DefenseFault


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
    most: Access
    queries: int  # images asked of it so far

    @property
    def sha256(self) -> str:
        """The hash of all that decides its logits, as far as that is known."""
        ...

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
    decay: Literal["cosine", "step", "constant"] = "cosine"  # step: x0.1 after each third of the epochs
    warmup: float = 0.0  # the part of the run in which lr rises linearly from 0


Loss = Callable[[Tensor, Tensor, Draw], Tensor]
Logits = Callable[[Tensor, Draw], Tensor]
Objective = Callable[[Logits, Tensor, Tensor, Draw], Tensor]


class Step(Protocol):
    """One step of a training: its number, clean pixels [B, C, H, W], labels [B], and its randomness."""

    number: int
    x: Tensor
    y: Tensor
    draw: Draw

    def report(self, loss: Tensor | float) -> None:
        """Show the loss. Raises BenchError where it is not finite."""
        ...


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, or any object with these two methods."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


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

    def steps(self, count: int, batch: int, *state: Stateful, queries: int = 0) -> Iterator[Step]:
        """The steps of a training that is no gradient descent; ``state`` is checkpointed and restored.

        Within a step torch's global randomness is seeded by the step. Ends early, and cleanly, before
        the step that would take the base's query count above ``queries`` (0: no limit).
        """
        ...

    def at(self, name: str, sigma: float | None = None) -> Job:
        """A stage of this training with a checkpoint, a seed and perhaps a noise level of its own.

        Of two trainings in one ``fit``, one at least must be ``at`` a name.
        """
        ...


class Part(ABC):
    """Something trained once and shared by all that ask for it: a denoiser, a diffusion model, an encoder.

    A subclass is a frozen dataclass. Its fields, the source of its file, the training data and the seed
    are its identity, so everything its training depends on must be a field. It never sees the base.
    """

    @abstractmethod
    def build(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        """The module, untrained; torch's random state is fixed."""

    @abstractmethod
    def fit(self, module: nn.Module, job: Job) -> None:
        """Train the module; ``job.sigma`` is 0, ``job.at(name, sigma)`` trains under noise."""


class Context(Protocol):
    """Everything needed to rebuild a defense: its base classifier, the shape of its task, and shared parts."""

    base: Base
    classes: int
    shape: tuple[int, int, int]  # channels, height, width

    @property
    def train_sigma(self) -> float:
        """The noise level of training."""
        ...

    def once(self, part: Part) -> nn.Module:
        """The part's module, trained: from the cache, or here and now. Frozen and in eval mode.

        Its parameters count as trained here. Where costs are only estimated it comes untrained.
        """
        ...

    def hub(self, source: str, filename: str) -> Path:
        """One file of ``source``, a folder or a hub id with an optional ``@revision``; its hash is recorded.

        What is loaded from it counts as trained elsewhere. Raises BenchError (MissingFile: no such file).
        """
        ...

    def inner(self, name: str, **config: Any) -> Defense:
        """Another defense as a component, on the same base, with its preset's Config and these changes."""
        ...

    def note(self, text: str) -> None:
        """State in the run's first lines and in its record what a reader of the results must know.

        For example that only some of the base's layers could be adapted.
        """
        ...


class Defense(nn.Module):
    """Base class of every defense. A plug-in must write ``logits``; the rest has defaults.

    The harness constructs it with torch's, numpy's and Python's random states fixed, calls ``fit``, stores what
    changed, then ``merge``, and from there on treats ``logits`` as a fixed function of one noisy image. Threads and
    devices have deep copies of it, so no state may be kept at the level of a module or a class.
    """

    access: ClassVar[Access] = Access.WEIGHTS
    family: ClassVar[str] = "other"  # the sort of method: PEFT, denoiser, diffusion, ...
    trains: ClassVar[str] = "other"  # none, training-free, denoiser-trained, classifier-tuned or from scratch
    paper: ClassVar[str] = ""  # arXiv id
    # The base was trained on another task, and the defense brings a head of its own: the harness trains no probe.
    adapts: ClassVar[bool] = False
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

    @classmethod
    def kind(cls, config: Any) -> str:
        """What this configuration trains, for the report; the default is ``trains``."""
        return cls.trains

    def build(self) -> None:
        """Make submodules, untrained; requires_grad says what will be trained."""

    def schedule(self) -> Schedule:
        """The hyperparameters of the default ``fit``: the Config, which then extends Schedule."""
        config: Schedule = self.config
        return config

    def fit(self, job: Job) -> None:
        """Train. The default minimises ``loss`` over all that requires a gradient; nothing does: nothing happens.

        Raises DefenseFault where there is something to train and ``schedule`` gives no Schedule.
        """
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        if not trained:
            return
        schedule = self.schedule()
        if not isinstance(schedule, Schedule):
            raise DefenseFault(
                f"it has {len(trained)} parameters to train ({trained[0]}, ...) and no learning rate or epochs: "
                f"make its Config a Schedule, `class Config(Schedule)`, write fit(), or, where they are not to be "
                f"trained, call requires_grad_(False) in build()"
            )
        job.train(self, lambda x, y, draw: self.loss(x, y, draw, job), schedule)

    def loss(self, x: Tensor, y: Tensor, draw: Draw, job: Job) -> Tensor:
        """The training loss of clean pixels ``x``; the default is the job's objective on ``logits``."""
        return job.objective(self.logits, x, y, draw)

    def merge(self) -> None:
        """Fold adapters into their layers; called once after fit or load.

        The logits must stay those that were trained: the harness compares a block of them before and after.
        """

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
