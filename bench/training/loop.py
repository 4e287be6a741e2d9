"""The gradient training loop: seeded at every step, checkpointed, and resumed to the same result."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.data.split import Split
from bench.errors import BenchError, DefenseFault, note, one_line
from bench.globalstate import fixed_rng
from bench.interface import Base, Loss, Objective, Schedule, Stateful, Step, StepDraw
from bench.io.files import replacing, writing
from bench.process import watchdog
from bench.smoothing.noise import Noise, TrainDraw
from bench.training import bfloat16
from bench.training.weights import FIX

VERSION = 1  # raise it whenever weights trained here would change: it is part of their identity
CHECKPOINT_SECONDS = 20.0
CROP_AREA = 0.08, 1.0  # of resized-crop: torchvision's defaults, with which ImageNet classifiers are trained
CROP_RATIO = 3 / 4, 4 / 3  # width to height
CROP_TRIES = 10


class Rows(Protocol):
    """Training data: a ``Split``, or features computed from one."""

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]: ...

    def __len__(self) -> int: ...

    def pixels(self, indices: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the given rows, [len(indices), ...]."""
        ...


Progress = Callable[[int, int, float], None]  # steps done, all steps, loss


@dataclass
class _Step:
    """The current step; satisfies ``interface.Step``."""

    number: int
    count: int
    x: Tensor
    y: Tensor
    draw: StepDraw
    progress: Progress

    def report(self, loss: Tensor | float) -> None:
        """Show the loss at every tenth step: reading it waits for the device."""
        if self.number % 10 == 9 or self.number == self.count - 1:
            value = float(loss)
            if not math.isfinite(value):
                raise DefenseFault(
                    f"training diverged: loss {value} at step {self.number} of {self.count}; "
                    f"set a lower learning rate with --set lr=..."
                )
            self.progress(self.number + 1, self.count, value)


class TrainingDraw(TrainDraw):
    """The randomness of one step of a training, with the step's place in it; satisfies ``interface.StepDraw``."""

    def __init__(
        self,
        noise: Noise,
        number: int,
        count: int,
        rows: Tensor,
        sigma: float,
        device: torch.device,
        trained: Sequence[nn.Module],
    ) -> None:
        """Describe step ``number`` of ``count``, on the training data's ``rows``; ``trained``: what it trains."""
        super().__init__(noise, number, len(rows), sigma, device)
        self.done, self.rows = number / count, rows
        self._trained = trained

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Set the trained modules to eval mode, and restore the mode of each submodule afterwards."""
        # By the flags alone: train() would undo a batch norm that is kept in eval mode.
        before = [(m, m.training) for module in self._trained for m in module.modules()]
        try:
            for m, _ in before:
                m.training = False
            yield
        finally:
            for m, training in before:
                m.training = training


@dataclass(frozen=True)
class TrainingJob:
    """One training run on ``data``; satisfies ``interface.Job``."""

    data: Rows
    augment: tuple[str, ...]
    sigma: float
    objective: Objective
    seed: int
    device: torch.device
    checkpoint: Path
    progress: Progress
    spent: list[float] = field(default_factory=list)  # seconds of each finished stage, earlier processes included
    base: Base | None = None  # its query count is restored with a checkpoint
    most: int | None = None  # maximum steps of a stage, for the conformance test
    arithmetic: Literal["float32", "bfloat16"] = "float32"  # of forward passes in train(); steps() are the caller's own
    used: set[str] = field(default_factory=set)  # arithmetic other than float32 that any stage has trained in

    @property
    def seconds(self) -> float:
        """Seconds of training so far, all stages together."""
        return sum(self.spent)

    def at(self, name: str, sigma: float | None = None) -> TrainingJob:
        """Return a stage with its own checkpoint and seed, and its own noise level where ``sigma`` is given."""
        seed = np.random.SeedSequence([self.seed, *name.encode()]).generate_state(1, np.uint64)[0] >> 1
        checkpoint = self.checkpoint.with_name(f"{self.checkpoint.stem}-{name}.pt")
        return replace(self, seed=int(seed), checkpoint=checkpoint, sigma=self.sigma if sigma is None else sigma)

    def train(self, module: nn.Module, loss: Loss, schedule: Schedule, clip_grad: float = 0.0) -> None:
        """Minimise ``loss`` over the parameters that require a gradient; leave the module in eval mode.

        ``clip_grad`` is the maximum l2 norm of a step's gradient; 0: none. The batch, augmentation, noise and dropout
        of a step depend on (seed, step) alone, so a resumed training gives the same weights as an uninterrupted one.
        Raises BenchError where the loss is not finite.
        """
        params = [p for p in module.parameters() if p.requires_grad]
        optimizer = _optimizer(params, schedule)
        count = self.count(schedule)
        train_mode(module)
        rounded = self.arithmetic == "bfloat16"
        self.used.update({self.arithmetic} - {"float32"})
        for step in self.steps(count, schedule.batch, module, optimizer):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * _decay(schedule, step.number / count)
            with bfloat16.passes(module, step.x) if rounded else nullcontext(step.x) as images:
                value = loss(images, step.y, step.draw)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if clip_grad:
                nn.utils.clip_grad_norm_(params, clip_grad)
            optimizer.step()
            step.report(value.detach())
        module.eval()

    def count(self, schedule: Schedule) -> int:
        """Return the number of steps of a schedule."""
        return max(1, round(schedule.epochs * len(self.data) / schedule.batch))

    def steps(self, count: int, batch: int, *state: Stateful, queries: int = 0) -> Iterator[Step]:
        """Yield the remaining steps, each with its randomness; checkpoint ``state`` between them.

        Ends before the step that would exceed ``queries`` queries of the base (0: no limit).
        """
        done, before, dearest = self._resume(state)
        started = saved = time.perf_counter()
        noise, trained = Noise(self.seed, "train"), [s for s in state if isinstance(s, nn.Module)]
        for number in range(done, count if self.most is None else min(count, self.most)):
            asked = self._queries()
            if queries and asked + dearest > queries:
                break
            rows = self._rows(number, batch)
            watchdog.heartbeat()
            with fixed_rng(self.seed, number):
                x = _augment(torch.from_numpy(self._pixels(rows)), self.augment).to(self.device)
                y = torch.from_numpy(self.data.labels[rows]).to(self.device)
                draw = TrainingDraw(noise, number, count, torch.from_numpy(rows), self.sigma, self.device, trained)
                yield _Step(number, count, x, y, draw, self.progress)
            dearest = max(dearest, self._queries() - asked)
            now = time.perf_counter()
            if now - saved > CHECKPOINT_SECONDS or number == count - 1:
                self._save(state, number + 1, before + now - started, dearest)
                saved = now
        self.spent.append(before + time.perf_counter() - started)

    def _pixels(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the rows' pixels; with resized-crop, of boxes drawn from torch's global random state."""
        if "resized-crop" not in self.augment:
            return self.data.pixels(rows)
        assert isinstance(self.data, Split)
        # Drawn before the pictures are decoded, so that they do not depend on their sizes.
        uniform = torch.rand(len(rows), CROP_TRIES, 4, dtype=torch.float64).tolist()
        return self.data.cropped(rows, [partial(_crop_box, u) for u in uniform])

    def _queries(self) -> int:
        return 0 if self.base is None else self.base.queries

    def _rows(self, step: int, batch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the rows of a step. Epochs, each in a seeded order, are joined and cut into full batches."""
        size = len(self.data)
        rows: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        at, wanted = step * batch, batch
        while wanted:
            epoch, offset = divmod(at, size)
            order = np.random.default_rng([self.seed, epoch]).permutation(size)
            part = order[offset : offset + wanted]
            rows.append(part)
            at, wanted = at + len(part), wanted - len(part)
        return np.concatenate(rows)

    def _save(self, state: tuple[Stateful, ...], step: int, seconds: float, dearest: int) -> None:
        """Write the checkpoint: a sha256, then torch's format, whose reader does not detect a flipped bit."""
        parts = [s.state_dict() for s in state]
        counts = {"step": step, "seconds": seconds, "dearest": dearest, "queries": self._queries()}
        buffer = io.BytesIO()
        torch.save({"state": parts, **counts}, buffer)
        with writing(self.checkpoint, FIX), replacing(self.checkpoint) as partial, partial.open("wb") as f:
            f.write(hashlib.sha256(buffer.getbuffer()).digest())
            f.write(buffer.getbuffer())

    def _resume(self, state: tuple[Stateful, ...]) -> tuple[int, float, int]:
        """Load the checkpoint. Return steps done, seconds, and the most queries of a step; zeros without one."""
        if not self.checkpoint.exists():
            return 0, 0.0, 0
        try:
            data = memoryview(self.checkpoint.read_bytes())
            size = hashlib.sha256().digest_size
            if hashlib.sha256(data[size:]).digest() != data[:size]:
                note(f"corrupt checkpoint {self.checkpoint}: it has changed since it was written; training again")
                return 0, 0.0, 0
            saved = torch.load(io.BytesIO(data[size:]), map_location=self.device, weights_only=True)
            for one, part in zip(state, saved["state"], strict=True):
                one.load_state_dict(part)
            if self.base is not None:
                self.base.queries = saved["queries"]
            return saved["step"], saved["seconds"], saved["dearest"]
        except Exception as e:
            raise BenchError(f"checkpoint {self.checkpoint}: {one_line(e)}; delete it to train again") from None


def _optimizer(params: list[nn.Parameter], s: Schedule) -> torch.optim.Optimizer:
    if s.optimizer == "sgd":
        return torch.optim.SGD(params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
    return kind(params, lr=s.lr, weight_decay=s.weight_decay)


def _decay(s: Schedule, done: float) -> float:
    """Return the factor on lr at the fraction ``done`` of the training."""
    if done < s.warmup:
        return max(done, 1e-3 * s.warmup) / s.warmup
    if s.decay == "constant":
        return 1.0
    if s.decay == "step":
        return 0.1 ** int(3 * done)
    return 0.5 * (1 + math.cos(math.pi * (done - s.warmup) / (1 - s.warmup)))


def train_mode(module: nn.Module) -> None:
    """Set training mode; batch norms without trainable parameters keep their statistics."""
    module.train()
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in m.parameters()):
            m.eval()


def _crop_box(uniform: list[list[float]], width: int, height: int) -> tuple[int, int, int, int]:
    """Return a random box (left, top, width, height) of a picture, as torchvision's RandomResizedCrop chooses it.

    Its area is uniform in ``CROP_AREA`` of the picture's, the logarithm of its ratio of sides uniform in that of
    ``CROP_RATIO``, its place uniform. If no try fits into the picture: the largest central box of an allowed ratio.

    Args:
        uniform: For each try four uniform numbers in [0, 1): for area, ratio, left and top.
        width: Of the picture.
        height: Of the picture.
    """
    least, most = CROP_RATIO
    for area, ratio, left, top in uniform:
        pixels = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area)
        shape = least * (most / least) ** ratio
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w, h = min(width, round(height * most)), min(height, round(width / least))
    return (width - w) // 2, (height - h) // 2, w, h


def _augment(x: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Crop at random after padding by an eighth of the side, and flip horizontally; by torch's global random state."""
    rows = len(x)
    if "crop" in kinds:
        height, width = x.shape[-2:]
        pad = height // 8
        padded = F.pad(x, (pad, pad, pad, pad))
        top, left = torch.randint(0, 2 * pad + 1, (2, rows))
        y = top[:, None, None] + torch.arange(height)[None, :, None]
        z = left[:, None, None] + torch.arange(width)[None, None, :]
        x = padded.permute(0, 2, 3, 1)[torch.arange(rows)[:, None, None], y, z].permute(0, 3, 1, 2)
    if "flip" in kinds:
        x = torch.where(torch.rand(rows, 1, 1, 1) < 0.5, x.flip(-1), x)
    return x.contiguous()
