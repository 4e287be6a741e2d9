"""What is certified, on one device: in how many threads it votes, and its checks before and after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError, DefenseFault, one_line
from bench.interface import Draw
from bench.models.arithmetic import steady
from bench.models.base import LocalBase
from bench.process import environment
from bench.process.runlog import log
from bench.records import fingerprint
from bench.records.schema import Fingerprint
from bench.runs import fitting
from bench.runs.certifier import Certifier, Drifted, Measured
from bench.runs.costs import cost_per_vote, distinct
from bench.smoothing import blocks
from bench.smoothing.engine import Device, Model, Pixels, Task, check_rows, side_by_side
from bench.smoothing.scheduler import Batch, Voted

ROUNDS = 4  # blocks that each thread computes while the others compute theirs


class Placed:
    """What is certified, on one device and checked there."""

    def __init__(self, certifier: Certifier, task: Task, index: int) -> None:
        """``index``: the first image of the run, of which the fingerprint is.

        Raises DefenseFault where logits are no function of one image (see ``check_rows``).
        """
        self.certifier, self.task, self._index = certifier, task, index
        environment.reset_peak_memory(task.device)
        self._models = [certifier.model(task.device)]
        with steady(), torch.inference_mode():
            self._reference = self._block(self._models[0])
            with fitting.blame(certifier.name, "in the check of its rows"):
                self._block_seconds = check_rows(self._models[0], task, index)

    @property
    def device(self) -> Device:
        """As the engine takes it."""
        return Device(self.task, self._models)

    @property
    def fingerprint(self) -> Fingerprint:
        """That of the function certified here."""
        logits = self._reference.cpu().float().numpy()
        return fingerprint.of(logits, self._index, environment.describe(self.task.device))

    def widen(self, threads: int) -> None:
        """Draw votes in so many threads: on a CPU a block in each, on a GPU noise in each beside one's forward pass.

        On a CPU in one where the defense cannot be copied, its copies do not fit into memory, or they disturb one
        another.
        """
        device, name = self.task.device, self.certifier.name
        if threads == 1 or not isinstance(self.certifier.base, LocalBase):
            return
        if device.type != "cpu":
            self._models = [in_turn(self._models[0])] * threads
            return
        try:
            # Modules may keep in attributes what they are about, so each thread has modules of its own.
            copies = [self.certifier.copy(share_weights=True).model(device) for _ in range(threads - 1)]
            same = self._unchanged(copies)
            disturbed = same and not apart(self._computations([*self._models, *copies]))
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

    def beside(self, device: torch.device) -> Placed:
        """The same on another device. Raises BenchError where logits are others there, and so votes."""
        there = Placed(
            self.certifier.copy(share_weights=False).to(device), replace(self.task, device=device), self._index
        )
        if not _equal(there._reference.cpu(), self._reference.cpu()):
            raise BenchError(
                f"{device} computes other logits than {self.task.device}: counts would depend on who draws a vote; "
                "choose GPUs of one kind with CUDA_VISIBLE_DEVICES"
            )
        return there

    def measure(self, calibrate: bool) -> Measured:
        """What a vote costs here and, if so asked, the unit of seconds elsewhere."""
        at_once = len(self._models) if self.task.device.type == "cpu" else 1
        with steady(), torch.inference_mode():
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
        """Draw a batch once more that was counted. Raises Drifted where the votes are others now."""
        with steady():
            again = self.device.vote(batch, Pixels(self.task))
        if changed := int(np.sum(again != voted)):
            raise Drifted(
                f"{changed} of {len(voted)} votes are others when a block is drawn again at the end of the run: it "
                "keeps a state, so nothing that it certified holds",
                self.certifier.name,
            )

    def finish(self) -> int:
        """The peak of memory in bytes. Raises Drifted, or BenchError where the base is no longer what it was."""
        self.certifier.base.check_unchanged(self.certifier.name)
        if not self._unchanged(self._models):
            raise Drifted(
                "other logits at the end of the run than at its start for the same image and draw: it keeps a state, "
                "so nothing that it certified holds",
                self.certifier.name,
            )
        check_apart([self])
        return environment.peak_memory(self.task.device)

    def _block(self, model: Model, number: int = 0) -> Tensor:
        """Logits of a block of votes that decide nothing, always the same for a number."""
        return blocks.check_logits(model, self.task, self._index, number)

    def _unchanged(self, models: Sequence[Model]) -> bool:
        found: list[bool] = []

        def look(model: Model, _: threading.Event) -> None:
            found.append(_equal(self._block(model), self._reference))

        with steady():
            side_by_side([partial(look, model) for model in dict.fromkeys(models)])
        return all(found)

    def _computations(self, models: Sequence[Model]) -> list[Callable[[], Tensor]]:
        """For each model, the computation of a block that no other one has."""
        return [partial(self._block, model, number) for number, model in enumerate(dict.fromkeys(models))]


def check_apart(places: Sequence[Placed]) -> None:
    """Raise Drifted where the models of the devices disturb one another, as seen in blocks computed side by side."""
    if not apart([c for place in places for c in place._computations(place._models)]):
        raise Drifted(
            "its copies on several threads or devices change one another's logits: keep no buffer at the level of a "
            "module or a class; nothing that they certified together holds",
            places[0].certifier.name,
        )


def apart(computations: Sequence[Callable[[], Tensor]]) -> bool:
    """Whether computations give the same when all are done at once, several times, as each gives alone."""
    if len(computations) == 1:
        return True
    found: list[bool] = []
    with steady(), torch.inference_mode():
        alone = [compute() for compute in computations]

        def look(number: int, _: threading.Event) -> None:
            for _round in range(ROUNDS):
                found.append(_equal(computations[number](), alone[number]))

        side_by_side([partial(look, number) for number in range(len(computations))])
    return all(found)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def in_turn(model: Model) -> Model:
    """The model for several threads, one at a time: one block in memory, and modules may keep what they like."""
    lock = threading.Lock()

    def alone(x: Tensor, draw: Draw) -> Tensor:
        with lock:
            return model(x, draw)

    return alone
