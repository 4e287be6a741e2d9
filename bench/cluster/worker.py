"""The code that runs on the nodes of a Ray cluster: training tasks, and the workers that draw votes.

Objects are packed here explicitly, so that classes of plug-in files are imported before they are unpacked.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import cloudpickle

from bench import plugins
from bench.errors import BenchError, one_line
from bench.models.arithmetic import deterministic
from bench.process import environment, watchdog
from bench.process.runlog import recording
from bench.runs import fresh_noise
from bench.runs.certifier import Certifier, DeviceCertifier
from bench.runs.fresh_noise import Audit
from bench.runs.session import Session
from bench.smoothing.engine import Device
from bench.smoothing.task import Task
from bench.smoothing.votes import Batch


def pack(thing: Any) -> bytes:
    """Pickle an object."""
    packed: bytes = cloudpickle.dumps(thing)  # type: ignore[no-untyped-call]
    return packed


def unpack(packed: bytes) -> Any:
    """Unpickle an object; classes of plug-in files must be imported (see ``Place.entered``)."""
    return cloudpickle.loads(packed)


@dataclass(frozen=True)
class Place:
    """The surroundings of the command's process, which its workers need too."""

    folder: str  # names of files are relative to it
    variables: dict[str, str]
    plugins: dict[str, bytes]  # see ``plugins.sources``
    threads: int  # of a worker, which reserves as many cores
    device: str  # its type: cpu or cuda
    timeout: float

    @contextmanager
    def entered(self) -> Iterator[torch.device]:
        """Set up this process; the value is its device. Raises BenchError where a plug-in cannot be imported."""
        os.environ.update(self.variables)
        if Path(self.folder).is_dir():  # a node without it can still draw votes
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory() as folder, watchdog.time_limit(self.timeout):
            if self.plugins:  # as files, since their source is part of what they train
                plugins.import_sources(self.plugins, Path(folder))
            yield torch.device(self.device)


class _Silent:
    """A ``runlog.Reporter`` that prints nothing, since the command's process shows the progress."""

    def say(self, text: str) -> None: ...

    def training(self, what: str) -> Any:
        return self

    def certifying(self, what: str, total: int, done: int) -> Any:
        return self

    def __enter__(self) -> Any:
        return lambda *_: None

    def __exit__(self, *_: object) -> None: ...


def prepare(place: Place, plan: bytes, out: Path) -> tuple[bytes | BenchError, bytes]:
    """Train a plan's defense, or take it from the cache; returns its ``RunHeader`` and its ``Certifier``, packed.

    It starts the run's log, which the command's process continues.
    """
    try:
        with place.entered() as device:
            session, known = Session(device, out, _Silent()), unpack(plan)
            with recording(session.log_file(known), session.reporter.terminal):
                prepared = session.begin(known)
                header = prepared.header()
            return pack(header), pack(prepared.certifier.to(torch.device("cpu")))
    except BenchError as e:
        return e, b""


class VoteWorker:
    """A Ray actor that holds certifiers on its own GPU or cores and draws batches of votes.

    It returns a BenchError instead of raising it, so that any exception it raises is a defect of certbench.
    """

    def __init__(self, place: Place) -> None:
        self._here = ExitStack()  # until the process ends
        self._device = self._here.enter_context(place.entered())
        self._threads = place.threads
        environment.keep_freed_memory()
        self._held: dict[int, DeviceCertifier | BenchError] = {}  # by run; an error: why it cannot

    def here(self) -> dict[str, Any]:
        """Describe the machine and the versions that it runs on."""
        return environment.describe(self._device) | {"node": platform.node()}

    def load(self, run: int, certifier: bytes, task: bytes, index: int, image: NDArray[Any], calibrate: bool) -> Any:
        """Load a run's certifier and check it on one image; returns its ``Measured`` and its fingerprint."""
        try:
            held: Certifier = unpack(certifier).to(self._device)
            there: Task = replace(unpack(task), images=lambda _: image[None], device=self._device)
            placed = DeviceCertifier(held, there, index)
            placed.use_threads(self._threads)
            measured = placed.measure(calibrate), placed.fingerprint
            self._held[run] = placed
            return measured
        except (ImportError, AttributeError) as e:
            self._held[run] = BenchError(
                f"a Ray worker cannot rebuild the defense: {one_line(e)}; install the same packages on every node"
            )
        except BenchError as e:
            self._held[run] = e
        return self._held[run]

    def _device_of(self, run: int) -> Device:
        """Return the device that draws a run's votes. Raises the BenchError of loading it."""
        held = self._held[run]
        if isinstance(held, BenchError):
            raise held
        return held.device

    def draw(self, run: int, batch: Batch, pixels: Mapping[int, NDArray[Any]]) -> Any:
        """Draw a batch; returns its votes (see ``Device.vote``) as 32-bit integers, and the seconds they took."""
        began = time.perf_counter()
        try:
            with deterministic():
                voted = self._device_of(run).vote(batch, pixels)
        except BenchError as e:
            return e
        return voted.astype(np.int32), time.perf_counter() - began

    def audit(self, run: int, task: bytes, wanted: Audit, pixels: Mapping[int, NDArray[Any]]) -> Any:
        """Count the hits of an audit's votes, whose noise ``task`` draws."""
        try:
            device = self._device_of(run)
            return fresh_noise.draw(replace(device, task=replace(unpack(task), device=self._device)), wanted, pixels)
        except BenchError as e:
            return e

    def finish(self, run: int) -> int | BenchError:
        """Release a finished run; returns the peak of memory in bytes, or why its certificates do not hold."""
        placed = self._held.pop(run, None)
        try:
            return placed.finish() if isinstance(placed, DeviceCertifier) else 0
        except BenchError as e:
            return e

    def drop(self, run: int) -> None:
        """Release a run that failed."""
        self._held.pop(run, None)
