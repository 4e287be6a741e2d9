"""Runs on workers of this process, in place of Ray's: the records of a local run, whatever happens to the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

from ray.exceptions import RayError

from bench.cluster import preparing
from bench.cluster import run as cluster_run
from bench.cluster.pool import LOSSES, Actor
from bench.cluster.preparing import Preparations
from bench.cluster.run import ClusterRun
from bench.cluster.voting import Voting
from bench.cluster.worker import Place, VoteWorker, pack, prepare
from bench.errors import BenchError, DefenseFault
from bench.options import RunOptions
from bench.process.console import ConsoleReporter
from bench.records.record import Record
from bench.runs.plan import Plan, make_plans
from bench.runs.session import Session
from bench.smoothing.votes import Certificate
from tests.helpers.commands import TINY

CPU = torch.device("cpu")
Change = Callable[[str, Any], Any]  # of the answer to a call of a method


@dataclass
class Call:
    """A call of a worker's method, made when its answer is asked for."""

    handle: Handle
    name: str
    args: tuple[Any, ...]

    def future(self) -> Future[Any]:
        answer: Future[Any] = Future()
        if self.name == self.handle.dies_in:
            self.handle.calls_left = 0
        if self.handle.calls_left == 0:
            answer.set_exception(RayError("it was killed"))
        else:
            self.handle.calls_left -= 1
            value = getattr(self.handle.worker, self.name)(*self.args)
            answer.set_result(self.handle.change(self.name, value))
        return answer


@dataclass
class Handle:
    """A worker in this process.

    It dies after ``calls_left`` calls, or in the method ``dies_in``; ``change`` alters its answers.
    """

    worker: VoteWorker
    calls_left: int = -1
    dies_in: str = ""
    change: Change = lambda _, value: value

    def __getattr__(self, name: str) -> Any:
        return Method(self, name)


@dataclass
class Method:
    handle: Handle
    name: str

    def remote(self, *args: Any) -> Call:
        return Call(self.handle, self.name, args)


class Cluster:
    """The loop of the command's process, with workers that answer one after the other."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.place = Place(str(Path.cwd()), {}, {}, 1, "cpu", 0.0)
        self.answers: deque[tuple[Call, Callable[[Any], None]]] = deque()
        self.ended: list[tuple[int, Record | DefenseFault]] = []
        self.workers: list[VoteWorker] = []
        self.voting = Voting(self.place, lambda call, then: self.answers.append((call, then)), self._end)
        session = Session(CPU, out, ConsoleReporter())
        preparations = Preparations([plan], session, ConsoleReporter(), self.place, self.voting.pool, lambda *_: None)
        header, certifier = prepare(self.place, pack(plan), out)
        answer: Future[Any] = Future()
        answer.set_result(header)
        preparations._finished(0, certifier, self._prepared, answer)

    def _end(self, number: int, outcome: Record | DefenseFault) -> None:
        self.ended.append((number, outcome))

    def _prepared(self, number: int, outcome: ClusterRun | Record | BenchError) -> None:
        assert isinstance(outcome, ClusterRun)
        self.voting.open(outcome)

    def hire(self, calls_left: int = -1, dies_in: str = "", change: Change | None = None) -> None:
        """Start a worker."""
        self.workers.append(VoteWorker(self.place))
        handle = Handle(self.workers[-1], calls_left, dies_in)
        if change is not None:
            handle.change = change
        actor = Actor(handle, self.voting._send, lambda call, then: self.answers.append((call, then)))
        self.voting.pool.actors.append(actor)
        here: Future[Any] = Future()
        here.set_result(self.workers[-1].here())
        self.voting.pool._arrived(actor, here)

    def work(self) -> Record | DefenseFault:
        """Certify the run to its end; a worker takes the place of each that died."""
        while self.voting.runs:
            if not self.voting.pool.actors:
                self.hire()
            self.voting.fill()
            call, then = self.answers.popleft()
            then(call.future())
        ((_, ended),) = self.ended
        return ended

    def close(self) -> None:
        for worker in self.workers:
            worker._here.close()


@pytest.fixture
def plan() -> Plan:
    (plan,) = make_plans(RunOptions(defenses="none", dataset=TINY, procedure="anytime", n=3000))
    return plan


@pytest.fixture
def cluster(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> Iterator[Cluster]:
    set_threads(1)
    for module in (preparing, cluster_run):
        monkeypatch.setattr(module.ray, "put", lambda value: value)
        monkeypatch.setattr(module.ray, "get", lambda value: value)
    made = Cluster(plan, tmp_path / "ray")
    yield made
    made.close()


@pytest.fixture
def local(plan: Plan, tmp_path: Path) -> dict[int, Certificate]:
    return certificates(Session(CPU, tmp_path / "local", ConsoleReporter()).run(plan))


def certificates(record: Record | DefenseFault) -> dict[int, Certificate]:
    assert isinstance(record, Record) and record.complete
    return {c.index: replace(c, seconds=0.0) for c in record.counted}


def test_two_workers_certify_as_one_process(cluster: Cluster, local: dict[int, Certificate]) -> None:
    cluster.hire()
    cluster.hire()
    record = cluster.work()
    assert certificates(record) == local
    assert isinstance(record, Record) and sum((record.info.environment.workers or {}).values()) == 2


@pytest.mark.parametrize("calls", [1, 3, 10])
def test_batches_of_a_lost_worker_are_drawn_again(cluster: Cluster, local: dict[int, Certificate], calls: int) -> None:
    cluster.hire(calls_left=calls)
    cluster.hire()
    assert certificates(cluster.work()) == local


def test_a_run_that_kills_every_worker_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    hire = cluster.hire
    monkeypatch.setattr(cluster, "hire", lambda: hire(calls_left=1))
    fault = cluster.work()
    assert isinstance(fault, DefenseFault) and f"took {LOSSES} workers with it: it was killed" in str(fault)


def test_a_worker_with_other_votes_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """It votes for other classes than the worker that draws one of its blocks again."""

    def other(method: str, value: Any) -> Any:
        return ((value[0] + 1) % 10, value[1]) if method == "draw" else value

    cluster.hire(change=other)
    cluster.hire()
    fault = cluster.work()
    assert isinstance(fault, DefenseFault)
    assert "votes of the worker on" in str(fault) and "set aside in" in str(fault)
    assert not list(tmp_path.glob("ray/*/certificates.jsonl"))


def test_a_worker_with_another_fingerprint_is_refused(cluster: Cluster) -> None:
    def other(method: str, value: Any) -> Any:
        if method != "load":
            return value
        measured, fingerprint = value
        return measured, fingerprint.replace(sha256="0", logits=[2 * v for v in fingerprint.logits])

    cluster.hire()
    cluster.hire(change=other)
    fault = cluster.work()
    assert isinstance(fault, DefenseFault) and "computes another function than" in str(fault)


def test_nodes_with_other_versions_are_refused(cluster: Cluster) -> None:
    here = VoteWorker(cluster.place)
    described = here.here()
    here._here.close()
    packages = described["packages"]
    with pytest.raises(BenchError, match=r"nodes of the Ray cluster have torch .* and 0\.1: install one"):
        cluster.voting.pool.check_versions({**described, "packages": {**packages, "torch": "0.1"}})


@pytest.mark.parametrize("method", ["load", "audit", "finish"])
@pytest.mark.parametrize("both", [False, True])
def test_a_worker_lost_at_any_stage_changes_nothing(
    cluster: Cluster, local: dict[int, Certificate], method: str, both: bool
) -> None:
    """``both``: there is no other worker then, and a new one takes over."""
    cluster.hire(dies_in=method)
    cluster.hire(dies_in=method if both else "")
    assert certificates(cluster.work()) == local
