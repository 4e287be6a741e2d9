"""The one gradient training loop: seeded step by step, checkpointed, resumed to the same result."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import BenchError, DefenseFault, note, one_line
from bench.globalstate import fixed_rng
from bench.interface import Base, Draw, Loss, Objective, Schedule, Stateful, Step
from bench.io.files import file_sha256, replacing, writing
from bench.process import watchdog
from bench.smoothing.noise import Noise, TrainDraw
from bench.training.weights import MEND

SOURCE = file_sha256(Path(__file__))  # read once: what runs, should the file be edited meanwhile
CHECKPOINT_SECONDS = 20.0


class Rows(Protocol):
    """What a training reads: a ``Split``, or features computed from one."""

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]: ...

    def __len__(self) -> int: ...

    def pixels(self, indices: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The given rows, [len(indices), ...]."""
        ...


Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss


@dataclass
class _Step:
    """One step under way; satisfies ``interface.Step``."""

    number: int
    count: int
    x: Tensor
    y: Tensor
    draw: Draw
    progress: Progress

    def report(self, loss: Tensor | float) -> None:
        """Show the loss every tenth step, so that a device is not waited for at each."""
        if self.number % 10 == 9 or self.number == self.count - 1:
            value = float(loss)
            if not math.isfinite(value):
                raise DefenseFault(
                    f"training diverged: loss {value} at step {self.number} of {self.count}; lower it with --set lr=..."
                )
            self.progress(self.number + 1, self.count, value)


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
    spent: list[float]  # seconds of training so far, earlier processes included, one entry a stage
    base: Base | None = None  # whose queries are counted, and restored with a checkpoint
    most: int | None = None  # steps a stage does at most: the conformance test's

    def at(self, name: str, sigma: float | None = None) -> TrainingJob:
        """A stage with a checkpoint, seed and perhaps noise level of its own."""
        seed = np.random.SeedSequence([self.seed, *name.encode()]).generate_state(1, np.uint64)[0] >> 1
        checkpoint = self.checkpoint.with_name(f"{self.checkpoint.stem}-{name}.pt")
        return replace(self, seed=int(seed), checkpoint=checkpoint, sigma=self.sigma if sigma is None else sigma)

    def train(self, module: nn.Module, loss: Loss, schedule: Schedule) -> None:
        """Minimise ``loss`` over the parameters that require a gradient; module ends in eval mode.

        Every step's batch, augmentation, noise and dropout depend on (seed, step) alone, so a run
        resumed from its checkpoint ends in the weights of an undisturbed one. Raises BenchError
        when the loss is not finite.
        """
        params = [p for p in module.parameters() if p.requires_grad]
        optimizer = _optimizer(params, schedule)
        count = max(1, round(schedule.epochs * len(self.data) / schedule.batch))
        _train_mode(module)
        for step in self.steps(count, schedule.batch, module, optimizer):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * _decay(schedule, step.number / count)
            value = loss(step.x, step.y, step.draw)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step.report(value.detach())
        module.eval()

    def steps(self, count: int, batch: int, *state: Stateful, queries: int = 0) -> Iterator[Step]:
        """The steps left to do, each with its randomness; what ``state`` holds between them is checkpointed.

        Ends before the step that would take the base's queries above ``queries`` (0: no limit).
        """
        done, before, dearest = self._resume(state)
        started = saved = time.perf_counter()
        noise = Noise(self.seed, "train")
        for number in range(done, count if self.most is None else min(count, self.most)):
            asked = self._queries()
            if queries and asked + dearest > queries:
                break
            rows = self._rows(number, batch)
            watchdog.alive()
            with fixed_rng(self.seed, number):
                x = _augment(torch.from_numpy(self.data.pixels(rows)), self.augment).to(self.device)
                y = torch.from_numpy(self.data.labels[rows]).to(self.device)
                draw = TrainDraw(noise, number, len(rows), self.sigma, self.device)
                yield _Step(number, count, x, y, draw, self.progress)
            dearest = max(dearest, self._queries() - asked)
            now = time.perf_counter()
            if now - saved > CHECKPOINT_SECONDS or number == count - 1:
                self._save(state, number + 1, before + now - started, dearest)
                saved = now
        self.spent.append(before + time.perf_counter() - started)

    def _queries(self) -> int:
        return 0 if self.base is None else self.base.queries

    def _rows(self, step: int, batch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The step's rows: a stream of epochs, each in its own seeded order, cut into whole batches."""
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
        """The checkpoint: sha256 of what follows, then torch's own format, whose reader notices no flipped bit."""
        parts = [s.state_dict() for s in state]
        counts = {"step": step, "seconds": seconds, "dearest": dearest, "queries": self._queries()}
        buffer = io.BytesIO()
        torch.save({"state": parts, **counts}, buffer)
        with writing(self.checkpoint, MEND), replacing(self.checkpoint) as partial, partial.open("wb") as f:
            f.write(hashlib.sha256(buffer.getbuffer()).digest())
            f.write(buffer.getbuffer())

    def _resume(self, state: tuple[Stateful, ...]) -> tuple[int, float, int]:
        """Steps done, seconds spent, and the queries of the dearest step: nothing without a whole checkpoint."""
        if not self.checkpoint.exists():
            return 0, 0.0, 0
        try:
            data = memoryview(self.checkpoint.read_bytes())
            size = hashlib.sha256().digest_size
            if hashlib.sha256(data[size:]).digest() != data[:size]:
                note(f"corrupt checkpoint {self.checkpoint}: not the file that was written; it is trained anew")
                return 0, 0.0, 0
            saved = torch.load(io.BytesIO(data[size:]), map_location=self.device, weights_only=True)
            for one, part in zip(state, saved["state"], strict=True):
                one.load_state_dict(part)
            if self.base is not None:
                self.base.queries = saved["queries"]
            return saved["step"], saved["seconds"], saved["dearest"]
        except Exception as e:
            raise BenchError(f"checkpoint {self.checkpoint}: {one_line(e)}; delete it to train anew") from None


def _optimizer(params: list[nn.Parameter], s: Schedule) -> torch.optim.Optimizer:
    if s.optimizer == "sgd":
        return torch.optim.SGD(params, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
    return kind(params, lr=s.lr, weight_decay=s.weight_decay)


def _decay(s: Schedule, done: float) -> float:
    """The factor on lr when the part ``done`` of the run is over."""
    if done < s.warmup:
        return max(done, 1e-3 * s.warmup) / s.warmup
    if s.decay == "constant":
        return 1.0
    if s.decay == "step":
        return 0.1 ** int(3 * done)
    return 0.5 * (1 + math.cos(math.pi * (done - s.warmup) / (1 - s.warmup)))


def _train_mode(module: nn.Module) -> None:
    """Training mode, except that batch norms nobody trains keep their statistics."""
    module.train()
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in m.parameters()):
            m.eval()


def _augment(x: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Random crop after padding by an eighth of the side, and horizontal flips; from torch's global random state."""
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
