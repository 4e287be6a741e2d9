"""What ``bench check`` found, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from bench.compare.baseline import ANY_BASE, Update
from bench.compare.check import NOT_COMPARABLE, PASSES, REGRESSES, RadiusTest, Report, number
from bench.compare.differences import differing
from bench.compare.entries import Entry
from bench.compare.power import CHURN, POWER, Sensitivity
from bench.io.files import digest
from bench.text import escape


class Annotation(NamedTuple):
    """A message for reviewers; ``level`` is error or warning."""

    level: str
    title: str
    message: str


def headline(found: Report) -> str:
    """Count the entries of each verdict."""
    counts = {v: sum(one.verdict == v for one in found.entries) for v in (PASSES, REGRESSES, NOT_COMPARABLE)}
    text = ", ".join(f"{verdict} {n}" for verdict, n in counts.items() if n)
    return f"{text}; of {len(found.entries)} in {found.baseline}"


def markdown(found: Report) -> str:
    """Write the report as markdown."""
    parts = [f"## bench check: {escape(headline(found))}"]
    for one in found.entries:
        lines = [f"- wrong: {escape(w)}" if one.run else f"- {escape(w)}" for w in one.wrong]
        lines += [f"- warning: {escape(w)}" for w in one.warnings] + [f"- {escape(n)}" for n in one.notes]
        parts.append("\n".join([f"### {one.verdict}: {escape(one.name)}", "", *lines]))
        if one.radii:
            parts.append(_table(one.radii))
    if found.not_in_baseline:
        parts.append("Not in the baseline (--update would add them): " + escape(", ".join(found.not_in_baseline)))
    if found.base == ANY_BASE:
        parts.append(
            "This baseline allows a retrained base: weights may differ, so each entry tests base and defense "
            "together. No p-value covers how much results vary between training runs."
        )
    if found.gate:
        parts.append(_gate(found, found.gate))
    return "\n\n".join(parts) + "\n"


def _table(tests: Sequence[RadiusTest]) -> str:
    columns = ("radius", "before", "now", "lost", "won", "p", "p_holm")
    cells = [{k: f"{getattr(test, k):{'g' if k == 'radius' else '.3g'}}" for k in columns} for test in tests]
    return str(pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True))


def _gate(found: Report, gate: Sensitivity) -> str:
    seen = " or ".join(
        f"{'more than any' if s.points is None else s.points} points where {s.churn:.0%} of the images also change by "
        "chance"
        for s in gate.seen
    )
    return (
        f"A regression is a loss of at least {found.points:g} points with p at most {found.level:g}, by "
        f"McNemar's exact one-sided test, Holm's correction over all {gate.tests} tests. Were every change a fair "
        f"coin, the chance of any false alarm is at most {gate.false_alarm_at_most:.2g} "
        f"({gate.false_alarm:.2g} where {CHURN:.0%} of the images change). On {gate.images} images a true loss "
        f"is found with a chance of at least {POWER:.0%} from {seen}; smaller ones may pass."
    )


def for_reviewers(found: Report) -> list[Annotation]:
    """Return what a reviewer should see."""
    rows = []
    for one in found.entries:
        rows += [Annotation("error", f"{one.verdict}: {one.name}", escape(w)) for w in one.wrong]
        rows += [Annotation("warning", one.name, escape(w)) for w in one.warnings]
    return rows


def changes(update: Update) -> list[str]:
    """Describe what ``--update`` changed, one line for each entry."""
    old, new = update.old, update.new
    before, after = ({digest(e.key(any_base=True)): e for e in b.entries} if b else {} for b in (old, new))
    lines = [f"removed: {one.name}" for key, one in before.items() if key not in after]
    for key, one in after.items():
        was = before.get(key)
        if was is None:
            lines.append(f"added: {one.name}: {_summary(one)}")
        elif was.sha256 != one.sha256:
            lines.append(_changed(was, one))
        else:
            lines.append(f"unchanged: {one.name}")
    if old and old.base != new.base:
        lines.append(f"base: {new.base}, was {old.base}")
    return [escape(line) for line in lines]


def _changed(was: Entry, now: Entry) -> str:
    fields = [{k: v for k, v in e.as_json().items() if k != "images"} for e in (was, now)]
    results = [f"{_summary(now)}; was {_summary(was)}"] if was.images != now.images else []
    return f"changed: {now.name}: " + "; ".join([*results, *differing(*fields)])


def _summary(one: Entry) -> str:
    shares = ", ".join(f"{one.certified(r)} at r = {r:g}" for r in one.radii)
    return f"of {len(one.images)} images {shares}; {number(one.cost.votes)} votes"
