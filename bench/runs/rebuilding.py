"""Rebuild the certified function of a finished run, to export, attack, inspect or ask it.

The run is rebuilt from its record as ``bench verify`` does, under the same rules for untrusted records, and must be the
function that was certified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import plugins
from bench.errors import BenchError, note
from bench.interface import Access, Defense
from bench.models.base import View
from bench.options import command
from bench.process.runlog import Reporter
from bench.records import audit
from bench.records.record import Record, read_run
from bench.runs.prepared import PreparedRun
from bench.runs.redraw import Rebuilt, chosen, not_named, plan_of, rebuild
from bench.runs.session import Session
from bench.training.weights import stored


def finished(path: Path, use: str) -> Record:
    """Read the record of a finished run; ``use``: what its model is wanted for, such as "attack".

    Raises BenchError where it is an imported log, unfinished, or fails its audit.
    """
    record = read_run(path)
    if record.imported:
        raise BenchError(f"{path}: an imported log comes without its model; {use} a run of bench run")
    if not record.complete:
        raise BenchError(f"{path} is not finished; finish it first: {command(record.info.arguments)}")
    if problem := audit.problem(record):
        raise BenchError(problem)
    return record


def rebuild_checked(record: Record, session: Session, defense: str | None = None, base: str | None = None) -> Rebuilt:
    """Prepare the record's run with the function that was certified.

    Weights that are not in the cache are trained again, which a note says. Raises BenchError where it cannot be rebuilt
    here.

    Args:
        record: As ``finished`` returns it.
        session: Its device, and where progress is shown.
        defense: The defense's file, which is run only where the user names it.
        base: Address of a served base, which is asked only where the user names it.
    """
    if why := not_named(record.info.arguments, defense, base):
        raise BenchError(f"{record.path}: {why}")
    with plugins.restricted_to([defense] if defense else []):
        plan = plan_of(record, defense, base)
    if plan.source != record.identity.defense.source:
        made_by, again = record.info.environment.certbench, command(record.info.arguments, "--out", "OTHER")
        raise BenchError(
            f"{record.path}: the code of defense {plan.defense} has changed since certbench {made_by} made this "
            f"record; train it again, into another folder: {again}"
        )
    if _not_cached(record):
        note(f"{record.path}: the weights of {record.identity.defense.name} are not in this cache; training them again")
    rebuilt = rebuild(record, session, chosen(plan, record), defense)
    if isinstance(rebuilt, str):
        raise BenchError(f"{record.path}: {rebuilt}")
    return rebuilt


def from_cache(record: Record, session: Session, defense: str | None = None) -> PreparedRun:
    """Prepare the record's run as ``rebuild_checked`` does, with weights of the cache alone.

    ``session`` has an ``UntrainedReporter``, which refuses to train bases and parts.
    """
    if _not_cached(record):
        raise _missing(record, record.identity.defense.name)
    return rebuild_checked(record, session, defense).run


def _not_cached(record: Record) -> bool:
    """Return whether the weights of a run's defense would have to be trained."""
    trained = record.identity.defense.trained
    return not record.info.arguments.get("weights") and not all(map(stored, trained))


def _missing(record: Record, what: str) -> BenchError:
    again = command(record.info.arguments, "--out", "OTHER")
    return BenchError(f"{record.path}: the weights of {what} are not in this cache; train them again: {again}")


class UntrainedReporter:
    """A reporter that refuses training: weights come from the cache. Satisfies ``runlog.Reporter``."""

    def __init__(self, terminal: Reporter, record: Record) -> None:
        self.terminal, self._record = terminal, record

    def say(self, text: str) -> None:
        """Print one line."""
        self.terminal.say(text)

    @contextmanager
    def training(self, what: str) -> Iterator[Callable[[int, int, float], None]]:
        """Return a context whose value raises BenchError, since it is called by a training alone."""

        def refuse(done: int, total: int, loss: float) -> None:
            raise _missing(self._record, what)

        yield refuse

    def certifying(self, what: str, total: int, done: int) -> Any:
        """Return a context whose value is called with (images done, correct so far)."""
        return self.terminal.certifying(what, total, done)


@contextmanager
def through_base(defense: Defense) -> Iterator[None]:
    """Let gradients pass a local base that the defense may only query.

    Certificates hold against attackers who know the base, and the harness has its weights.
    """
    views = [m.context.base for m in defense.modules() if isinstance(m, Defense)]
    raised = [v for v in views if isinstance(v, View) and v.most is Access.QUERY]
    for view in raised:
        view.most = Access.GRADIENT
    try:
        yield
    finally:
        for view in raised:
            view.most = Access.QUERY
