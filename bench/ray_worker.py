"""What runs on the nodes of a Ray cluster: training tasks, and the workers that draw votes.

What crosses between processes is packed here, so that a class of the user's own file is known where it is unpacked.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from torch import Tensor

from bench import blocks, environment, registry
from bench.certification import Certifier, measure
from bench.certify import Model, Task, vote
from bench.errors import BenchError, one_line
from bench.run import DRIFT, Session, steady
from bench.scheduler import Batch

_written: list[tempfile.TemporaryDirectory[str]] = []  # plug-ins' files: their source is part of what they train


def pack(thing: Any) -> bytes:
    """A thing as bytes."""
    packed: bytes = cloudpickle.dumps(thing)  # type: ignore[no-untyped-call]
    return packed


def unpack(packed: bytes) -> Any:
    """The thing again; classes of plug-in files must be known (see ``Place.enter``)."""
    return cloudpickle.loads(packed)


@dataclass(frozen=True)
class Place:
    """What the command's own process has around it, and another must have too."""

    folder: str  # names of files are relative to it
    variables: dict[str, str]
    plugins: dict[str, bytes]  # see ``registry.sources``
    threads: int
    device: str  # its kind

    def enter(self) -> torch.device:
        """Make this process such a one. Raises BenchError where a plug-in cannot be imported."""
        os.environ.update(self.variables)
        if os.path.isdir(self.folder):  # a node without it can still draw votes
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        if self.plugins:
            _written.append(tempfile.TemporaryDirectory())
            registry.import_sources(self.plugins, Path(_written[-1].name))
        return torch.device(self.device)


@dataclass(frozen=True)
class Failed:
    """A BenchError of another process, in its own words."""

    words: str
    drifted: bool = False  # nothing that it certified holds


class _Silent:
    """Satisfies ``run.Reporter``: what is done elsewhere is shown by the command's own process."""

    def say(self, text: str) -> None: ...

    def training(self, what: str) -> Any:
        return self

    def certifying(self, what: str, total: int, done: int) -> Any:
        return self

    def __enter__(self) -> Any:
        return lambda *_: None

    def __exit__(self, *_: object) -> None: ...


def prepare(place: Place, plan: bytes, out: Path) -> tuple[bytes | Failed, bytes]:
    """A task: train what a plan needs, or take it from the cache. Its ``Ready`` and its ``Certifier``, packed."""
    try:
        device = place.enter()
        ready, certifier = Session(device, out, _Silent()).ready(unpack(plan))
    except BenchError as e:
        return Failed(str(e)), b""
    return pack(ready), pack(certifier.to(torch.device("cpu")))


class VoteWorker:
    """An actor: holds what is certified once on its own GPU or cores, and draws the votes it is asked for."""

    def __init__(self, place: Place) -> None:
        self._device = place.enter()
        self._held: dict[int, tuple[Certifier, Model, Task, Tensor | None]] = {}

    def here(self) -> dict[str, Any]:
        """The machine and versions it runs on."""
        return environment.describe(self._device)

    def load(self, run: int, certifier: bytes, task: bytes, index: int, image: NDArray[Any], calibrate: bool) -> Any:
        """Hold what a run certifies, and check it on one image: its ``Measured``, or ``Failed``."""
        try:
            held: Certifier = unpack(certifier).to(self._device)
            there: Task = replace(unpack(task), images=lambda _: image[None], device=self._device)
        except (ImportError, AttributeError) as e:
            return Failed(f"a Ray worker cannot rebuild the defense: {one_line(e)}; install the same on every node")
        environment.reset_peak_memory(self._device)
        model = held.model(self._device)
        self._held[run] = held, model, there, None
        try:
            with steady(), torch.inference_mode():
                reference = blocks.check_logits(model, there, index)
                self._held[run] = held, model, replace(there, labels=lambda _: index), reference
                return measure(held, model, there, index, calibrate)
        except BenchError as e:
            return Failed(str(e))

    def draw(self, run: int, batch: Batch, pixels: Mapping[int, NDArray[Any]]) -> Any:
        """A batch's votes (see ``certify.vote``), as 32-bit integers, and the seconds they took; or ``Failed``."""
        _, model, task, _ = self._held[run]
        began = time.perf_counter()
        try:
            with steady(), torch.inference_mode():
                voted = vote(model, task, batch, pixels)
        except BenchError as e:
            return Failed(str(e))
        return voted.astype(np.int32), time.perf_counter() - began

    def drop(self, run: int) -> int | Failed:
        """Let go of a run: the peak of memory in bytes, or ``Failed`` where its base is no longer what it was."""
        if run not in self._held:
            return 0
        certifier, model, task, reference = self._held.pop(run)
        try:
            certifier.base.check_unchanged(certifier.name)
            if reference is not None:
                with steady(), torch.inference_mode():
                    again = blocks.check_logits(model, task, task.labels(0))
                if not torch.equal(again.nan_to_num(), reference.nan_to_num()):
                    return Failed(f"defense {certifier.name}: {DRIFT}", drifted=True)
        except BenchError as e:
            return Failed(str(e))
        return environment.peak_memory(self._device)
