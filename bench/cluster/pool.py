"""A Ray cluster and the workers on it: as many as it has room for, whoever comes and goes."""

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

LOSSES = 5  # workers that may die over one thing before it is given up

When = Callable[[Any, Callable[[Any], None]], None]  # a reference, and what is to be called with its future


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster at ``address``, to the one Ray finds by itself, or to one started here for the time.

    Raises BenchError where none is at the address.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as e:  # Ray raises what it likes, a bare Exception among it
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise BenchError(f"no Ray cluster at {where}: {one_line(e)}; start one with: ray start --head") from None
    try:
        yield
    finally:
        ray.shutdown()


def pick_device(name: str) -> torch.device:
    """The kind of device of ``--device`` on the cluster. Raises BenchError where it has none of the kind."""
    has_gpus = cast(Any, ray).cluster_resources().get("GPU", 0) > 0
    if name == "auto":
        name = "cuda" if has_gpus else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not has_gpus):
        raise BenchError(f"--device {name}: not on this Ray cluster; there is cpu{', cuda' if has_gpus else ''}")
    return torch.device(name)


@dataclass(eq=False)
class Actor:
    """A worker on the cluster; satisfies ``dispatch.Worker``."""

    handle: Any
    ask: Callable[[Actor, int, Batch], None]
    when: When
    here: dict[str, Any] = field(default_factory=dict)  # its environment, known once it joined
    holds: set[int] = field(default_factory=set)  # runs
    _out: int = 0  # calls that are not answered
    _since: float = 0.0  # when it began the first of them

    @property
    def node(self) -> str:
        """The name of the machine that it runs on."""
        return str(self.here.get("node"))

    def same_machine(self, other: Actor) -> bool:
        """Whether it computes as another one does, to the last bit."""
        return environment.same_machine(self.here, other.here)

    def send(self, run: int, batch: Batch) -> None:
        self.ask(self, run, batch)

    def call(self, method: Any, *args: Any, then: Callable[[Any], None]) -> None:
        """Have a method of it called after those called before, and ``then`` with the future of the answer."""
        if not self._out:
            self._since = time.monotonic()
        self._out += 1
        self.when(method.remote(*args), then)

    def answered(self) -> float:
        """Note that a call is answered, or never will be; how many seconds it was under way."""
        took, self._since = time.monotonic() - self._since, time.monotonic()
        self._out -= 1
        return took


class Crew:
    """Hires where the cluster has room, and dismisses where a training needs it.

    ``joined`` and ``left`` are called with each worker that may be sent batches, and that no longer may.
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
        # A worker has as many cores as torch has threads, so that it computes as the command's own process would.
        self.needs = {"num_cpus": place.threads, "num_gpus": int(place.device == "cuda")}
        self.actors: list[Actor] = []
        self._stillborn = 0  # workers that died as they started, one after the other
        self._versions: dict[str, Any] = {}

    def look(self, trainings: int) -> None:
        """Have as many workers as there is room for beside so many trainings. Raises BenchError where there is none."""
        cores, gpus = self.needs["num_cpus"], self.needs["num_gpus"]
        nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
        room = sum(min(int(r.get("CPU", 0) // cores), int(r.get("GPU", 0)) if gpus else 1 << 30) for r in nodes)
        if not room:
            raise BenchError(
                f"no node of the Ray cluster has room for a worker, which takes {cores} cores (as many as torch takes "
                f"threads here: set OMP_NUM_THREADS) and {gpus} GPUs"
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
            self._stillborn += 1
            if self._stillborn == LOSSES:
                raise BenchError(f"Ray workers die as they start: {why(e)}") from None
            return
        self.check_versions(here)
        self._stillborn, actor.here = 0, here
        self._joined(actor)

    def check_versions(self, here: dict[str, Any]) -> None:
        """Raise BenchError where a node has other versions than the first that was heard of: counts could differ."""
        versions = {"certbench": here["certbench"], **here["packages"]}
        self._versions = self._versions or versions
        if other := [k for k, v in versions.items() if v != self._versions[k]]:
            k = other[0]
            raise BenchError(f"nodes of the Ray cluster have {k} {self._versions[k]} and {versions[k]}: install one")

    def lose(self, actor: Actor) -> None:
        """Forget a worker that died, or is to; once."""
        if actor in self.actors:
            self.actors.remove(actor)
            self._left(actor)


def why(error: RayError) -> str:
    """What happened, which Ray says last."""
    return str(error).strip().splitlines()[-1].strip()
