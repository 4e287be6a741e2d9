"""What runs on the nodes of a Ray cluster: training tasks, and the workers that draw votes.

What crosses between processes is packed here, so that a class of the user's own file is known where it is unpacked.
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
from bench.models.arithmetic import steady
from bench.process import environment, watchdog
from bench.process.runlog import recording
from bench.runs import recheck
from bench.runs.certifier import Certifier
from bench.runs.device import Placed
from bench.runs.recheck import Audit
from bench.runs.session import Session
from bench.smoothing.engine import Device, Task
from bench.smoothing.scheduler import Batch


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
    plugins: dict[str, bytes]  # see ``plugins.sources``
    threads: int
    device: str  # its kind
    timeout: float

    @contextmanager
    def entered(self) -> Iterator[torch.device]:
        """Within it this process is such a one; its device. Raises BenchError where a plug-in cannot be imported."""
        os.environ.update(self.variables)
        if os.path.isdir(self.folder):  # a node without it can still draw votes
            os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        with tempfile.TemporaryDirectory() as folder, watchdog.time_limit(self.timeout):
            if self.plugins:  # as files, since their source is part of what they train
                plugins.import_sources(self.plugins, Path(folder))
            yield torch.device(self.device)


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


def prepare(place: Place, plan: bytes, out: Path) -> tuple[bytes | BenchError, bytes]:
    """A task: train what a plan needs, or take it from the cache. Its ``Ready`` and its ``Certifier``, packed.

    It writes the run's log, which the command's own process goes on with.
    """
    try:
        with place.entered() as device:
            session, known = Session(device, out, _Silent()), unpack(plan)
            with recording(session.log_file(known), session.reporter.terminal):
                ready, certifier = session.ready(known)
            return pack(ready), pack(certifier.to(torch.device("cpu")))
    except BenchError as e:
        return e, b""


class VoteWorker:
    """An actor: holds what is certified once on its own GPU or cores, and draws the votes it is asked for.

    What it raises that a user can mend it returns, so that whatever else it raises is a fault of certbench.
    """

    def __init__(self, place: Place) -> None:
        self._here = ExitStack()  # until the process ends
        self._device = self._here.enter_context(place.entered())
        self._threads = environment.threads(self._device)
        environment.keep_freed_memory()
        self._held: dict[int, Placed | BenchError] = {}  # an error: why it could not be held

    def here(self) -> dict[str, Any]:
        """The machine and versions it runs on."""
        return environment.describe(self._device) | {"node": platform.node()}

    def load(self, run: int, certifier: bytes, task: bytes, index: int, image: NDArray[Any], calibrate: bool) -> Any:
        """Hold what a run certifies, and check it on one image: its ``Measured`` and fingerprint."""
        try:
            held: Certifier = unpack(certifier).to(self._device)
            there: Task = replace(unpack(task), images=lambda _: image[None], device=self._device)
            placed = Placed(held, there, index)
            placed.widen(self._threads)
            measured = placed.measure(calibrate), placed.fingerprint
            self._held[run] = placed
            return measured
        except (ImportError, AttributeError) as e:
            said = f"a Ray worker cannot rebuild the defense: {one_line(e)}; install the same on every node"
            self._held[run] = BenchError(said)
        except BenchError as e:
            self._held[run] = e
        return self._held[run]

    def _device_of(self, run: int) -> Device:
        """Where its votes are drawn. Raises the BenchError for which the run could not be held."""
        held = self._held[run]
        if isinstance(held, BenchError):
            raise held
        return held.device

    def draw(self, run: int, batch: Batch, pixels: Mapping[int, NDArray[Any]]) -> Any:
        """A batch's votes (see ``Device.vote``), as 32-bit integers, and the seconds they took."""
        began = time.perf_counter()
        try:
            with steady():
                voted = self._device_of(run).vote(batch, pixels)
        except BenchError as e:
            return e
        return voted.astype(np.int32), time.perf_counter() - began

    def audit(self, run: int, task: bytes, wanted: Audit, pixels: Mapping[int, NDArray[Any]]) -> Any:
        """Hits of the votes of an audit, which ``task`` draws."""
        try:
            device = self._device_of(run)
            return recheck.draw(replace(device, task=replace(unpack(task), device=self._device)), wanted, pixels)
        except BenchError as e:
            return e

    def finish(self, run: int) -> int | BenchError:
        """Let go of a run that is done: the peak of memory in bytes, or why its certificates do not hold."""
        placed = self._held.pop(run, None)
        try:
            return placed.finish() if isinstance(placed, Placed) else 0
        except BenchError as e:
            return e

    def drop(self, run: int) -> None:
        """Let go of a run that failed."""
        self._held.pop(run, None)
