"""Estimate how long the runs of a study take, from what finished ones took; before the first, from one short timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.errors import DefenseFault
from bench.records.record import Record
from bench.records.shards import Shard
from bench.runs.estimate import Estimator, training_passes
from bench.runs.identity import examples
from bench.runs.plan import Plan
from bench.runs.splits import Splits


class TimeLeft:
    """What each run costs, in passes of an image through its defense, and the seconds of a pass.

    Votes are the most that may be drawn, so seconds of a pass are lower where a procedure stops early.
    """

    def __init__(self, plans: Sequence[Plan], device: torch.device, shard: Shard | None = None) -> None:
        """Count the passes of every run. Raises BenchError where the data are missing."""
        self._plans, self._device, self._shard = plans, device, shard
        self._splits = Splits()
        self._passes = [self._count(plan) for plan in plans]
        self._left = set(range(len(plans)))
        self._measured: list[tuple[str, float, float]] = []  # defense, passes, seconds
        self._timed: float | None = None

    @property
    def votes(self) -> int:
        """The most votes that all runs may draw."""
        return sum(self._images(plan) * plan.procedure.max_votes for plan in self._plans)

    def ended(self, number: int, record: Record | None) -> None:
        """Take a run off the list and learn from its record, if it has one."""
        self._left.discard(number)
        cost = record.info.cost if record and record.complete else None
        if cost is not None and cost.certify_seconds is not None:
            seconds = cost.certify_seconds + (cost.train_seconds or 0.0)
            self._measured.append((self._plans[number].defense, self._passes[number], seconds))

    def seconds(self) -> float | None:
        """Estimate the seconds of all runs that have not ended; None where no pass could be timed."""
        if not self._left:
            return 0.0
        if not self._measured and self._timed is None:
            self._timed = self._time(min(self._left))
        known = [self._seconds_of_a_pass(self._plans[number].defense) for number in self._left]
        if None in known:
            return None
        return sum(self._passes[number] * (each or 0.0) for number, each in zip(self._left, known, strict=True))

    def _seconds_of_a_pass(self, defense: str) -> float | None:
        """Return the mean over finished runs of the defense, else over all finished runs, else what was timed."""
        own = [one for one in self._measured if one[0] == defense] or self._measured
        passes = sum(one[1] for one in own)
        return sum(one[2] for one in own) / passes if passes else self._timed

    def _time(self, number: int) -> float | None:
        try:
            found = Estimator(self._device, self._shard, self._splits).estimate(self._plans[number])
        except DefenseFault:  # the run itself will report it
            return None
        return (found.seconds + found.train_seconds) / self._passes[number] or None  # 0: a served base is not timed

    def _images(self, plan: Plan) -> int:
        chosen = examples(plan, self._splits.certified(plan))
        return len(self._shard.part(chosen) if self._shard else chosen)

    def _count(self, plan: Plan) -> float:
        train, validation = (self._splits.usual(plan.card)[name] for name in ("train", "validation"))
        # By the Config: a defense whose schedule is another's is timed as if it trained nothing, until one is measured.
        passes = training_passes(plan, plan.config, train, validation)
        return self._images(plan) * plan.procedure.max_votes + passes
