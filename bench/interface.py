"""The interface between a defense and the harness: the Defense class, and the objects passed to it.

A defense owns two things: how it trains, and the map from noisy pixels to logits. The harness owns everything else:
data, base classifier, noise, votes, statistics, seeds, caching and records.

Pixels are float32 in [0, 1] before noise is added; noisy pixels are not clipped. Radii are l2 distances between images.

A certificate holds only if ``logits`` is one fixed function of one noisy image and the row's own draws. The harness
tests this and refuses defenses whose logits depend on other rows, threads, earlier calls, the process or the noise's
keys; it also tests certificates on fresh noise. It cannot exclude a defense that attacks the process it runs in:
docs/certification.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from bench.errors import DefenseFault


class Access(IntEnum):
    """The access a defense needs to the trained weights of the base classifier."""

    NONE = 0  # the architecture only
    QUERY = 1  # logits
    GRADIENT = 2  # gradients with respect to the input
    WEIGHTS = 3  # a private copy


class Draw(Protocol):
    """The randomness of one batch. Each row has its own key, so its values do not depend on the other rows."""

    sigma: float  # noise level, in pixels of [0, 1]

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal noise ``[B, *shape]``, with new values at every call."""
        ...


class StepDraw(Draw, Protocol):
    """The randomness of one training step, and what an objective may need to know of the step."""

    done: float  # fraction of the training done before this step
    rows: Tensor  # positions of the batch's images in the training data [B], on the CPU

    def evaluating(self) -> AbstractContextManager[None]:
        """Set the trained modules to eval mode, as during an attack, and restore each one's mode afterwards."""
        ...


class Base(Protocol):
    """The frozen classifier under defense.

    Callable, not an nn.Module: a defense that may only query it holds no weights of it.
    """

    classes: int
    most: Access  # the highest access allowed
    queries: int  # images passed to it so far

    @property
    def sha256(self) -> str:
        """Hash of everything known that decides its logits."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Compute logits.

        Args:
            x: Pixels [B, C, H, W] in [0, 1]; noisy, unclipped ones are allowed.

        Returns:
            Logits [B, classes], detached for QUERY access, differentiable in ``x`` for GRADIENT.

        Raises:
            DefenseFault: The defense declares Access.NONE.
        """
        ...

    def copy(self, classes: int | None = None) -> nn.Module:
        """Return a private trainable copy; needs WEIGHTS access.

        Args:
            classes: Number of classes; where it differs from the base's, the copy has a new head.

        Returns:
            A module from pixels [B, C, H, W] in [0, 1] to logits, with the normalisation inside.

        Raises:
            DefenseFault: The defense declares less access.
        """
        ...

    def untrained(self, classes: int) -> nn.Module:
        """Return the same architecture with random weights, for any access. Raises BenchError for a remote model."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of gradient training; the ``Config`` of a trained defense extends it."""

    epochs: float = 20.0  # passes over the training images
    batch: int = 128  # images of a step
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3  # learning rate
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.01
    decay: Literal["cosine", "step", "constant"] = "cosine"  # step: x0.1 after each third of the epochs
    warmup: float = 0.0  # fraction of the training in which lr rises linearly from 0


Loss = Callable[[Tensor, Tensor, StepDraw], Tensor]
Logits = Callable[[Tensor, Draw], Tensor]
Objective = Callable[[Logits, Tensor, Tensor, StepDraw], Tensor]


class Step(Protocol):
    """One training step."""

    number: int  # from 0
    x: Tensor  # clean pixels [B, C, H, W] in [0, 1]
    y: Tensor  # labels [B]
    draw: StepDraw

    def report(self, loss: Tensor | float) -> None:
        """Show the loss. Raises DefenseFault where it is not finite."""
        ...


class Stateful(Protocol):
    """State that a checkpoint can store: a module, an optimizer, or any object with these two methods."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors, numbers and containers of them."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore the state."""
        ...


class Job(Protocol):
    """One resumable training on the card's training split."""

    @property
    def sigma(self) -> float:
        """Noise level, in pixels of [0, 1]."""
        ...

    @property
    def objective(self) -> Objective:
        """The loss chosen by ``--objective``: (logits, clean x, y, draw) -> loss; it adds the noise itself."""
        ...

    def train(self, module: nn.Module, loss: Loss, schedule: Schedule) -> None:
        """Train a module by gradient descent.

        Args:
            module: Its parameters that require a gradient are trained.
            loss: Maps (clean pixels [B, C, H, W], labels [B], draw) to a scalar.
            schedule: Epochs, batch size, optimizer and learning rate.

        Raises:
            DefenseFault: The loss is not finite.
        """
        ...

    def count(self, schedule: Schedule) -> int:
        """Return the number of steps that ``train`` takes by a schedule."""
        ...

    def steps(self, count: int, batch: int, *state: Stateful, queries: int = 0) -> Iterator[Step]:
        """Iterate over the steps of a training with a loop of the defense's own.

        Within a step torch's global random state is seeded by the step. A resumed training continues after the last
        checkpoint.

        Args:
            count: Number of steps.
            batch: Images of a step.
            *state: What is checkpointed and restored.
            queries: End before the step that would exceed this many queries of the base; 0: no limit.
        """
        ...

    def at(self, name: str, sigma: float | None = None) -> Job:
        """Return a stage of this training with its own checkpoint and seed, and its own noise level if given.

        If ``fit`` trains twice, at least one of the two must be a stage. Names are unique within ``fit``.
        """
        ...


class Part(ABC):
    """A component trained once and shared by defenses: a denoiser, a diffusion model, an encoder.

    A subclass is a frozen dataclass. Its fields, the source of its file, the training data and the seed are its
    identity, so everything its training depends on must be a field. It has no access to the base.
    """

    @abstractmethod
    def build(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        """Make the untrained module for images of ``shape`` (channels, height, width); random states are fixed."""

    @abstractmethod
    def fit(self, module: nn.Module, job: Job) -> None:
        """Train the module made by ``build``; ``job.sigma`` is 0, ``job.at(name, sigma)`` trains under noise."""


class Context(Protocol):
    """Everything needed to rebuild a defense: its base classifier, the shape of its task, and shared parts."""

    base: Base
    classes: int
    shape: tuple[int, int, int]  # channels, height, width

    @property
    def train_sigma(self) -> float:
        """Noise level of training, in pixels of [0, 1]."""
        ...

    def once(self, part: Part) -> nn.Module:
        """Return the trained module of a part, frozen and in eval mode; train it if the cache does not have it.

        Its parameters count as trained here. In estimates of cost it is untrained.
        """
        ...

    def hub(self, source: str, filename: str = "") -> Path:
        """Return the local path of a file, and record its hash.

        Parameters loaded from it count as trained elsewhere.

        Args:
            source: A folder, or a hub id with an optional ``@revision``; without ``filename``, the file itself.
            filename: Path of the file in it.

        Raises:
            MissingFile: There is no such file.
            BenchError: The file cannot be downloaded.
        """
        ...

    def inner(self, name: str, **config: Any) -> Defense:
        """Build another defense as a component, on the same base.

        Args:
            name: Name of the defense, or path of its file.
            **config: Changes to its Config for the preset.

        Raises:
            BenchError: The name or a setting is unknown, or the component needs more access than this defense.
        """
        ...

    def note(self, text: str) -> None:
        """Print a remark among the run's first lines, and record it.

        For facts a reader of the results must know, such as that only some of the base's layers could be adapted.
        """
        ...


class Defense(nn.Module):
    """Base class of every defense. A plug-in must write ``logits``; everything else has a default.

    The harness constructs it with torch's, numpy's and Python's random states fixed, calls ``fit``, stores what
    changed, calls ``merge``, and from then on treats ``logits`` as a fixed function of one noisy image. Threads and
    devices use deep copies, so no state may be kept in a module or a class.
    """

    access: ClassVar[Access] = Access.WEIGHTS
    family: ClassVar[str] = "other"  # kind of method: PEFT, denoiser, diffusion, ...
    trains: ClassVar[str] = "other"  # none, training-free, denoiser-trained, classifier-tuned or from scratch
    paper: ClassVar[str] = ""  # arXiv id
    # True: it brings its own head for a base that was trained on another task, so the harness trains no probe.
    adapts: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # values of Config by preset: quick, standard, paper

    @dataclass(frozen=True)
    class Config:
        """All hyperparameters; ``--set key=value`` sets one."""

    def __init__(self, context: Context, config: Any) -> None:
        """Store the context and an instance of ``Config``, and call ``build``."""
        super().__init__()
        self.context = context
        self.config = config
        self.build()

    @classmethod
    def needs(cls, config: Any) -> Access:
        """Return the access this configuration needs; checked against the base before anything is loaded."""
        return cls.access

    @classmethod
    def kind(cls, config: Any) -> str:
        """Return what this configuration trains, for the report; the default is ``trains``."""
        return cls.trains

    @classmethod
    def uses_objective(cls, config: Any) -> bool:
        """Return whether ``--objective`` trains this configuration; by default where ``loss`` is the default one."""
        return cls.loss is Defense.loss

    @classmethod
    def differentiable(cls, config: Any) -> bool:
        """Return whether gradients of the training loss reach the images, as objectives that attack them need.

        By default where the access is more than queries, or none: then the network is the defense's own.
        """
        return cls.needs(config) is not Access.QUERY

    def build(self) -> None:
        """Make the untrained submodules; parameters that require a gradient will be trained."""

    def schedule(self) -> Schedule:
        """Return the hyperparameters of the default ``fit``: by default the Config, which then extends Schedule."""
        config: Schedule = self.config
        return config

    def fit(self, job: Job) -> None:
        """Train the defense; by default minimise ``loss``, a no-op without trainable parameters.

        Raises DefenseFault where there are parameters to train and ``schedule`` returns no Schedule.
        """
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        if not trained:
            return
        schedule = self.schedule()
        if not isinstance(schedule, Schedule):
            raise DefenseFault(
                f"it has {len(trained)} parameters to train ({trained[0]}, ...), and no learning rate or epochs; make "
                f"its Config a Schedule, `class Config(Schedule)`, or write fit(); to keep them untrained, call "
                f"requires_grad_(False) in build()"
            )
        job.train(self, lambda x, y, draw: self.loss(x, y, draw, job), schedule)

    def loss(self, x: Tensor, y: Tensor, draw: StepDraw, job: Job) -> Tensor:
        """Compute the training loss; by default the job's objective on ``logits``.

        Args:
            x: Clean pixels [B, C, H, W] in [0, 1].
            y: Labels [B].
            draw: The step's randomness; passed on to the objective.
            job: The training.

        Returns:
            A scalar.
        """
        return job.objective(self.logits, x, y, draw)

    def merge(self) -> None:
        """Fold adapters into their layers; called once after training or loading.

        Must not change the logits: the harness compares a block of them before and after.
        """

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        """Compute logits, each row from its own image alone.

        Args:
            x: Noisy, unclipped pixels [B, C, H, W].
            draw: The only source of randomness of a randomised defense; its rows are keyed by vote.

        Returns:
            Logits [B, classes].
        """
        raise NotImplementedError(f"{type(self).__name__} must write logits(self, x, draw)")

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        """Call ``logits`` for the harness. Raises ValueError where the result is not a float tensor [B, classes]."""
        out = self.logits(x, draw)
        wanted = (x.shape[0], self.context.classes)
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != wanted or not out.is_floating_point():
            got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"logits must return a float tensor of shape {wanted}, not {got}")
        return out
