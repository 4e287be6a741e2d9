"""Share the runs of one command on a Ray cluster (``--executor ray``).

This process trains nothing and draws no vote. It schedules, and is the only one that writes records.
A worker or a node may be lost at any moment: its votes are drawn elsewhere, from the same keys.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.cluster.pool import connected, pick_device, threads_beside_gpus
from bench.cluster.preparing import Preparations
from bench.cluster.run import ClusterRun
from bench.cluster.voting import Voting
from bench.cluster.worker import Place
from bench.errors import BenchError, DefenseFault, one_line
from bench.models.served import is_url
from bench.plugins import sources
from bench.process.runlog import Reporter
from bench.records.record import Record
from bench.runs.plan import Plan
from bench.runs.session import Session

LOOK = 2.0  # seconds between two looks at the resources of the cluster

_VARIABLES = ("CERTBENCH_CACHE", "CERTBENCH_DATA")  # sent to workers as absolute paths


def run(
    plans: Sequence[Plan], out: Path, reporter: Reporter, device: str, address: str | None, timeout: float
) -> Iterator[tuple[int, Record | DefenseFault]]:
    """Do all runs, or resume them; yields each one's number in ``plans`` and its record or fault as soon as it ended.

    Raises BenchError where something is missing that they all need.
    """
    if served := next((plan.base for plan in plans if is_url(plan.base)), None):
        raise BenchError(
            f"--executor ray: base {served} is served elsewhere, and one process asks it; leave the option out"
        )
    with connected(address):
        driver = _Driver(plans, out, reporter, pick_device(device), timeout)
        try:
            yield from driver.run()
        except KeyboardInterrupt:
            driver.note("interrupted", logging.INFO)
            raise
        except Exception as e:
            driver.note(str(e) if isinstance(e, BenchError) else one_line(e), logging.ERROR)
            raise
        finally:
            driver.close()


class _Driver:
    """The loop of the command's process: it handles answers of the cluster one after the other."""

    def __init__(
        self, plans: Sequence[Plan], out: Path, reporter: Reporter, device: torch.device, timeout: float
    ) -> None:
        self._plans, self._reporter = plans, reporter
        threads = torch.get_num_threads() if device.type == "cpu" else threads_beside_gpus()
        variables = {k: str(Path(os.environ[k]).absolute()) for k in _VARIABLES if os.environ.get(k)}
        plugins = sources(plan.defense for plan in plans)
        place = Place(str(Path.cwd()), variables, plugins, threads, device.type, timeout)
        self._answers: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ended: list[tuple[int, Record | DefenseFault]] = []
        self._voting = Voting(place, self._when, lambda number, outcome: self._ended.append((number, outcome)))
        session = Session(device, out, reporter)
        self._preparations = Preparations(plans, session, reporter, place, self._voting.pool, self._when)
        self._bars, self._shown = ExitStack(), -1
        self._update: Callable[..., None] = print

    def run(self) -> Iterator[tuple[int, Record | DefenseFault]]:
        """Do all runs to their end."""
        self._preparations.start(self._prepared)
        looked = -LOOK
        while self._preparations.pending or self._voting.runs:
            if time.monotonic() - looked > LOOK:
                self._voting.pool.look(len(self._preparations.pending))
                looked = time.monotonic()
            self._voting.fill()
            self._show()
            try:
                self._answers.get(timeout=LOOK)()
            except queue.Empty:
                continue
            ended = self._ended.copy()
            self._ended.clear()
            yield from ended

    def note(self, text: str, level: int) -> None:
        """Write the event that ends the command into the log of every run under way."""
        for run in self._voting.runs.values():
            run.log.write(text, level)

    def close(self) -> None:
        """Release records and workers, finished or not."""
        self._bars.close()
        self._voting.close()

    def _when(self, reference: Any, then: Callable[[Any], None]) -> None:
        """Call ``then`` in the loop with the future of ``reference``, once it has its result."""
        reference.future().add_done_callback(lambda future: self._answers.put(lambda: then(future)))

    def _prepared(self, number: int, outcome: ClusterRun | Record | BenchError) -> None:
        if isinstance(outcome, ClusterRun):
            self._voting.open(outcome)
        elif isinstance(outcome, Record):
            self._ended.append((number, outcome))
        else:
            self._voting.fail(number, outcome)

    def _show(self) -> None:
        """Show the progress of the first run that is not done; while there is none, that of the trainings."""
        runs, pending = self._voting.runs, self._preparations.pending
        first = min(runs, default=len(self._plans))
        if first != self._shown:
            self._bars.close()
            self._shown = first
            bar = (
                runs[first].writer.progress()
                if first in runs
                else self._reporter.training(f"{len(self._plans)} defenses on the cluster")
            )
            self._update = self._bars.enter_context(bar)
        if first in runs:
            self._update(*runs[first].writer.so_far)
        else:
            self._update(len(self._plans) - len(pending), len(self._plans), math.nan)
