"""Connect to a Ray cluster and keep as many workers on it as it has room for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayError

from bench.cluster.worker import Place, VoteWorker
from bench.errors import BenchError, one_line
from bench.process import environment
from bench.smoothing.votes import Batch

LOSSES = 5  # workers that may die of one task or batch before it is given up

When = Callable[[Any, Callable[[Any], None]], None]  # a reference, and the function to call with its future


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the cluster at ``address``, to the one that Ray finds, or to one started here for the command.

    Raises BenchError where there is no cluster at the address.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as e:  # of any type: Ray raises even a bare Exception
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise BenchError(f"no Ray cluster at {where}: {one_line(e)}; start one with: ray start --head") from None
    try:
        yield
    finally:
        ray.shutdown()


def pick_device(name: str) -> torch.device:
    """Choose the kind of device of ``--device`` on the cluster. Raises BenchError where it has none."""
    has_gpus = cast(Any, ray).cluster_resources().get("GPU", 0) > 0
    if name == "auto":
        name = "cuda" if has_gpus else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not has_gpus):
        raise BenchError(f"--device {name}: not on this Ray cluster, which has cpu{', cuda' if has_gpus else ''}")
    return torch.device(name)


def threads_beside_gpus() -> int:
    """Return the number of cores to reserve for each worker with a GPU: its share where GPUs have the fewest."""
    nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
    shares = [environment.gpu_threads(int(r.get("CPU", 0)), int(r["GPU"])) for r in nodes if r.get("GPU")]
    return min(shares, default=1)


@dataclass(eq=False)
class Actor:
    """A worker on the cluster; satisfies ``dispatch.Worker``."""

    handle: Any
    ask: Callable[[Actor, int, Batch], None]
    when: When
    here: dict[str, Any] = field(default_factory=dict)  # its environment, known once it has joined
    holds: set[int] = field(default_factory=set)  # runs
    _open: int = 0  # calls that are not answered
    _since: float = 0.0  # when it began the first of them

    @property
    def node(self) -> str:
        """The name of the machine that it runs on."""
        return str(self.here.get("node"))

    def same_machine(self, other: Actor) -> bool:
        """Whether both compute the same logits, to the last bit."""
        return environment.same_machine(self.here, other.here)

    def send(self, run: int, batch: Batch) -> None:
        self.ask(self, run, batch)

    def call(self, method: Any, *args: Any, then: Callable[[Any], None]) -> None:
        """Call one of its methods, in the order of the calls; ``then`` gets the future of the answer."""
        if not self._open:
            self._since = time.monotonic()
        self._open += 1
        self.when(method.remote(*args), then)

    def answered(self) -> float:
        """Note that a call was answered or has failed; returns the seconds that it took."""
        took, self._since = time.monotonic() - self._since, time.monotonic()
        self._open -= 1
        return took


class WorkerPool:
    """Starts workers where the cluster has room, and stops some where a training needs it.

    ``joined`` is called with each worker that is ready for batches, ``left`` with each that no longer is.
    """

    def __init__(
        self,
        place: Place,
        ask: Callable[[Actor, int, Batch], None],
        when: When,
        joined: Callable[[Actor], None],
        left: Callable[[Actor], None],
    ) -> None:
        self._place, self._ask, self._when, self._joined, self._left = place, ask, when, joined, left
        # All cores that it uses: on a CPU as many as torch has threads, so that it computes as the command would.
        self.needs = {"num_cpus": place.threads, "num_gpus": int(place.device == "cuda")}
        self.actors: list[Actor] = []
        self._failed_starts = 0  # in a row
        self._versions: dict[str, Any] = {}

    def look(self, trainings: int) -> None:
        """Start or stop workers, to use all room but that of ``trainings``. Raises BenchError where there is none."""
        cores, gpus = self.needs["num_cpus"], self.needs["num_gpus"]
        nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
        room = sum(min(int(r.get("CPU", 0) // cores), int(r.get("GPU", 0)) if gpus else 1 << 30) for r in nodes)
        if not room:
            raise BenchError(
                f"no node of the Ray cluster has room for a worker, which takes {cores} cores"
                + (f" and {gpus} GPU" if gpus else " (as many as torch takes threads here: set OMP_NUM_THREADS)")
            )
        wanted = max(0, room - trainings)
        for actor in self.actors[wanted:] if trainings else []:
            self.lose(actor)
            ray.kill(actor.handle)
        for _ in range(wanted - len(self.actors)):
            handle = cast(Any, ray).remote(max_restarts=0, **self.needs)(VoteWorker).remote(self._place)
            actor = Actor(handle, self._ask, self._when)
            self.actors.append(actor)
            self._when(handle.here.remote(), partial(self._arrived, actor))

    def _arrived(self, actor: Actor, future: Any) -> None:
        if actor not in self.actors:
            return
        try:
            here = future.result()
        except RayError as e:
            self.actors.remove(actor)
            self._failed_starts += 1
            if self._failed_starts == LOSSES:
                raise BenchError(f"Ray workers die as they start: {reason(e)}") from None
            return
        self.check_versions(here)
        self._failed_starts, actor.here = 0, here
        self._joined(actor)

    def check_versions(self, here: dict[str, Any]) -> None:
        """Raise BenchError where a node's versions differ from the first node's: counts could differ."""
        versions = {"certbench": here["certbench"], **here["packages"]}
        self._versions = self._versions or versions
        if other := [k for k, v in versions.items() if v != self._versions[k]]:
            k = other[0]
            raise BenchError(f"nodes of the Ray cluster have {k} {self._versions[k]} and {versions[k]}: install one")

    def lose(self, actor: Actor) -> None:
        """Remove a worker that died or will be stopped; a no-op the second time."""
        if actor in self.actors:
            self.actors.remove(actor)
            self._left(actor)


def reason(error: RayError) -> str:
    """Return the last line of Ray's message, which is the cause."""
    return str(error).strip().splitlines()[-1].strip()
