"""The progress of ``bench run STUDY.toml``: which run it is, the time left in all, and the file of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError, DefenseFault, note
from bench.process.console import duration
from bench.process.environment import pick_device
from bench.records import study
from bench.records.record import Record, read_run
from bench.records.shards import Shard
from bench.runs.identity import run_label
from bench.runs.plan import Plan
from bench.runs.study import StudyFile
from bench.runs.timeleft import TimeLeft


class StudyProgress:
    """Prints the progress of a study and keeps its results."""

    def __init__(self, file: StudyFile, plans: Sequence[Plan], out: Path, device: str, shard: Shard | None) -> None:
        """Begin or resume: finished runs of an earlier command count as done. Raises BenchError."""
        self._plans, self._shard, self._ended = plans, shard, 0
        self._results = study.StudyWriter(out, _started(file, plans))
        self._left = TimeLeft(plans, pick_device(device), shard)
        done = _finished(out, self._results.study)
        for number, record in done.items():
            self._left.ended(number, record)
        finished = f", {len(done)} of them finished" if done else ""
        note(f"{file.path}: {len(plans)} runs{finished}, at most {self._left.votes:,} votes")
        basis = "what finished runs took" if done else "a short timing of the first run's untrained defense"
        note(f"{self._time_left()}, by {basis}, without the training of bases and shared parts")

    def begin(self, number: int) -> None:
        """Announce a run, counted from 0."""
        label = run_label(self._plans[number])
        note(f"run {number + 1} of {len(self._plans)}: {label}" + (f"; {self._time_left()}" if self._ended else ""))

    def ended(self, number: int, outcome: Record | DefenseFault) -> None:
        """Keep the folder of a finished run, and estimate the rest by what it took."""
        self._ended += 1
        if isinstance(outcome, DefenseFault):
            self._left.ended(number, None)
            return
        folder = outcome.path.parent if outcome.info.shard else outcome.path
        self._results.finished(number, folder.name)
        self._left.ended(number, outcome)

    def _time_left(self) -> str:
        seconds = self._left.seconds()
        return "time left not known yet" if seconds is None else f"about {duration(seconds)} left in all (an estimate)"


def unfinished(file: StudyFile, plans: Sequence[Plan], out: Path) -> list[Plan]:
    """Return the plans whose runs are not finished in ``out``, and say how many are."""
    done = _finished(out, study.resumed(out, _started(file, plans)))
    if done:
        note(f"{file.path}: {len(done)} of {len(plans)} runs are finished in {out}; what follows is of the others")
    return [plan for number, plan in enumerate(plans) if number not in done]


def _started(file: StudyFile, plans: Sequence[Plan]) -> study.Study:
    return study.started(file.path.name, file.text, [(run_label(plan), plan.options.record()) for plan in plans])


def _finished(out: Path, results: study.Study) -> dict[int, Record]:
    """Return the finished runs of a study; any other folder the run itself will report."""
    found = {}
    for number, run in enumerate(results.runs):
        try:
            record = read_run(out / run.folder) if run.folder else None
        except BenchError:
            continue
        if record and record.complete:
            found[number] = record
    return found
