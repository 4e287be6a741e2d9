"""The classifier that is certified: it can be copied to threads, devices and processes, and is checked on each."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError, DefenseFault, one_line
from bench.interface import Defense, Draw
from bench.models import arithmetic
from bench.models.arithmetic import deterministic
from bench.models.base import BaseModel, LocalBase
from bench.models.rounded import RoundedWeights
from bench.process import environment
from bench.process.runlog import log
from bench.records import fingerprint
from bench.records.schema import Fingerprint
from bench.runs import fitting
from bench.runs.costs import Measured, cost_per_vote, distinct
from bench.smoothing import blocks
from bench.smoothing.engine import Device
from bench.smoothing.noisecheck import check_device
from bench.smoothing.rowcheck import check_rows
from bench.smoothing.task import ImageCache, Model, Task
from bench.smoothing.threads import side_by_side
from bench.smoothing.votes import Batch, Voted

IN_FLIGHT = 2  # batches of a GPU: it computes one while the host counts another's votes
GPU_THREADS = 2  # that start blocks on a GPU which makes its own noise: one may draw for the defense on the CPU
ROUNDS = 4  # blocks that each thread computes while the others compute theirs


class NotOneFunction(DefenseFault):
    """The logits proved not to be one fixed function of one image: no certificate of the run holds."""


@dataclass(frozen=True)
class Certifier:
    """A fitted defense and the base that it queries. It can be sent to another process."""

    name: str
    defense: Defense
    base: BaseModel  # kept alive here, since the defense's view of it keeps only a weak reference
    arithmetic: tuple[str, ...] = ()
    _rounded: RoundedWeights = field(default_factory=RoundedWeights)  # one copy of the weights for all threads

    def model(self, device: torch.device) -> Model:
        """Make the function from noisy pixels to logits [B, classes], in the arithmetic that is certified.

        The function raises DefenseFault naming the defense.
        """
        base = self.base.module
        logits, kept = arithmetic.model(self.defense, self.arithmetic, device, base, self._rounded), self

        def model(x: Tensor, draw: Draw) -> Tensor:
            with fitting.attribute_errors(kept.name, "in certification", alone=False):
                return logits(x, draw)

        return model

    def to(self, device: torch.device) -> Certifier:
        """Move it to a device, in place."""
        self.defense.to(device)
        self.base.module.to(device)
        return self

    def copy(self, share_weights: bool) -> Certifier:
        """Copy it for another device or, sharing the weights in memory, for another thread."""
        kept: dict[int, Any] = {}
        if share_weights:
            tensors = [t for m in (self.defense, self.base.module) for t in (*m.parameters(), *m.buffers())]
            kept = {id(t): t for t in tensors}
        defense, base = copy.deepcopy((self.defense, self.base), kept)
        rounded = self._rounded if share_weights else RoundedWeights()
        return Certifier(self.name, defense, base, self.arithmetic, rounded)


class DeviceCertifier:
    """A certifier on one device, checked there before and after it votes."""

    def __init__(self, certifier: Certifier, task: Task, index: int) -> None:
        """Check the certifier on ``task.device``; ``index``: the run's first image, used for the fingerprint.

        Raises DefenseFault where logits are no function of one image (see ``check_rows``), BenchError where the device
        draws other grid noise than the CPU.
        """
        self.certifier, self.task, self._index = certifier, task, index
        with torch.inference_mode():
            check_device(task, index)
        environment.reset_peak_memory(task.device)
        self._models = [certifier.model(task.device)]
        with deterministic(), torch.inference_mode():
            self._reference = self._block(self._models[0])
            with fitting.attribute_errors(certifier.name, "in the check of its rows"):
                self._block_seconds = check_rows(self._models[0], task, index)

    @property
    def device(self) -> Device:
        """The device and its models, for the engine."""
        return Device(self.task, self._models, IN_FLIGHT if self.task.device.type == "cuda" else 1)

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the function certified here."""
        logits = self._reference.cpu().float().numpy()
        return fingerprint.of(logits, self._index, environment.describe(self.task.device))

    def use_threads(self, threads: int) -> None:
        """Vote in several threads: on a CPU each computes blocks; for a GPU each draws, and one at a time calls it.

        On a CPU one thread votes where the defense cannot be copied, where its copies do not fit into memory, or where
        they change one another's logits.
        """
        device, name = self.task.device, self.certifier.name
        if threads == 1 or not isinstance(self.certifier.base, LocalBase):
            return
        if device.type != "cpu":
            most = threads if self.task.noise_on_cpu else GPU_THREADS
            self._models = [serialized(self._models[0])] * min(threads, most)
            return
        try:
            # Modules may keep state of a call in attributes, so each thread has modules of its own.
            copies = [self.certifier.copy(share_weights=True).model(device) for _ in range(threads - 1)]
            same = self._unchanged(copies)
            disturbed = same and not independent(self._computations([*self._models, *copies]))
        except Exception as e:
            if isinstance(e, BenchError) and not blocks.out_of_memory(e):
                raise
            log.warning("%s votes in one thread, not %d: %s", name, threads, one_line(e))
            return
        if not same:
            raise DefenseFault("a copy of it gives other logits: keep all that decides them in its modules", name)
        if disturbed:
            log.warning(
                "%s votes in one thread, not %d: its copies in several threads change one another's logits; keep no "
                "buffer at the level of a module or a class",
                name,
                threads,
            )
            return
        self._models += copies

    def replicate(self, device: torch.device) -> DeviceCertifier:
        """Copy it to another device. Raises BenchError where logits, and so votes, differ there."""
        there = DeviceCertifier(
            self.certifier.copy(share_weights=False).to(device), replace(self.task, device=device), self._index
        )
        if not _equal(there._reference.cpu(), self._reference.cpu()):
            raise BenchError(
                f"{device} computes other logits than {self.task.device}, so counts would depend on which device draws "
                "a vote; choose GPUs of one kind with CUDA_VISIBLE_DEVICES"
            )
        return there

    def measure(self, calibrate: bool) -> Measured:
        """Measure the cost of a vote here and, with ``calibrate``, the machine's unit of seconds."""
        at_once = len(self._models) if self.task.device.type == "cpu" else 1
        with deterministic(), torch.inference_mode():
            per_vote = cost_per_vote(self.certifier.defense, self.task, self._index)  # counted, so not as compiled
            calibration = environment.calibration_seconds(self.task.device) / at_once if calibrate else None
        parameters = None if per_vote.flops is None else distinct([self.certifier.defense, *per_vote.classifiers])
        return Measured(
            block_seconds=self._block_seconds / at_once,
            base_forwards=per_vote.base_forwards,
            flops=per_vote.flops,
            parameters=parameters,
            calibration=calibration,
            nan_rows=int(self._reference.isnan().any(1).sum()),
            rows=self.device.rows,
            at_once=self.device.at_once,
        )

    def check_again(self, batch: Batch, voted: Voted) -> None:
        """Draw a batch again that was counted. Raises NotOneFunction where votes differ."""
        with deterministic():
            again = self.device.vote(batch, ImageCache(self.task).get(s.image for s in batch.spans))
        if changed := int(np.sum(again != voted)):
            raise NotOneFunction(
                f"{changed} of {len(voted)} votes differ when a block is drawn again at the end of the run: the "
                "defense keeps a state, so none of its certificates hold",
                self.certifier.name,
            )

    def finish(self) -> int:
        """Check the function at the end of a run and return the peak of memory in bytes.

        Raises NotOneFunction where its logits changed, BenchError where the base's weights did.
        """
        self.certifier.base.check_unchanged(self.certifier.name)
        if not self._unchanged(self._models):
            raise NotOneFunction(
                "logits of the same image and draw differ at the end of the run from those at its start: the defense "
                "keeps a state, so none of its certificates hold",
                self.certifier.name,
            )
        check_independent([self])
        return environment.peak_memory(self.task.device)

    def _block(self, model: Model, number: int = 0) -> Tensor:
        """Logits of a block of votes that decide nothing, always the same for a number."""
        return blocks.check_logits(model, self.task, self._index, number)

    def _unchanged(self, models: Sequence[Model]) -> bool:
        found: list[bool] = []

        def look(model: Model, _: threading.Event) -> None:
            found.append(_equal(self._block(model), self._reference))

        with deterministic():
            side_by_side([partial(look, model) for model in dict.fromkeys(models)])
        return all(found)

    def _computations(self, models: Sequence[Model]) -> list[Callable[[], Tensor]]:
        """For each model, the computation of a block that no other model computes."""
        return [partial(self._block, model, number) for number, model in enumerate(dict.fromkeys(models))]


def check_independent(places: Sequence[DeviceCertifier]) -> None:
    """Raise NotOneFunction where the models of all devices change one another's logits when they run at once."""
    if not independent([c for place in places for c in place._computations(place._models)]):
        raise NotOneFunction(
            "its copies on several threads or devices change one another's logits: keep no buffer at the level of a "
            "module or a class; none of the certificates hold",
            places[0].certifier.name,
        )


def independent(computations: Sequence[Callable[[], Tensor]]) -> bool:
    """Test whether computations that run at once, several times, give what each gives alone."""
    if len(computations) == 1:
        return True
    found: list[bool] = []
    with deterministic(), torch.inference_mode():
        alone = [compute() for compute in computations]

        def look(number: int, _: threading.Event) -> None:
            for _round in range(ROUNDS):
                found.append(_equal(computations[number](), alone[number]))  # noqa: PERF401 - shared by threads

        side_by_side([partial(look, number) for number in range(len(computations))])
    return all(found)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def serialized(model: Model) -> Model:
    """Let several threads call the model one at a time: memory for one block, and modules may keep state of a call."""
    lock = threading.Lock()

    def call(x: Tensor, draw: Draw) -> Tensor:
        with lock:
            return model(x, draw)

    return call
