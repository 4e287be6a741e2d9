"""``bench check``: compare runs with a saved baseline, in accuracy and in cost.

Accuracy regresses where an exact paired test and a least effect agree on it. What does not vary (votes, forward
passes, parameters) is compared exactly, and where nothing that decides counts has changed, counts must be equal. One
timing on each side allows no test, so seconds only warn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.compare.baseline import Baseline, read, trusted
from bench.compare.differences import differing
from bench.compare.entries import Entry, entry_of
from bench.compare.power import LEVEL, Sensitivity, sensitivity
from bench.errors import BenchError
from bench.records import paired
from bench.records.record import Record, find_runs, read_run

POINTS = 2.0  # the smallest loss that counts
FACTOR = 1.5  # of seconds, before a warning

PASSES, REGRESSES, NOT_COMPARABLE = "passes", "regresses", "not comparable"


@dataclass
class RadiusTest:
    """The images certified at one radius, before and now, and the test of whether more were lost than by chance."""

    radius: float
    images: int
    before: int
    now: int
    lost: int
    won: int
    p: float
    p_holm: float = 1.0
    regresses: bool = False


@dataclass
class Judgement:
    """An entry of the baseline and what was found of its run; ``run`` is None where there is none."""

    name: str
    verdict: str = PASSES
    run: str | None = None
    wrong: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    radii: list[RadiusTest] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What ``check`` found. ``gate`` is None where there was nothing to test."""

    baseline: str
    base: str
    level: float
    points: float
    entries: list[Judgement]
    not_in_baseline: list[str]
    gate: Sensitivity | None

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``--json`` prints it."""
        return asdict(self)


def check(file: Path, runs: Path, points: float = POINTS, factor: float = FACTOR) -> Report:
    """Compare each entry of the baseline with its run in ``runs``.

    Raises BenchError where the baseline cannot be read or two runs match one entry.
    """
    if not 0 <= points <= 100 or not factor >= 1:
        raise BenchError("--points must lie from 0 to 100, --factor from 1")
    baseline = read(file)
    records = [r for r in map(read_run, find_runs(runs)) if not r.imported]
    finished = [(r, entry_of(r)) for r in records if r.complete]
    entries = [_judge(old, baseline, finished, records, factor) for old in baseline.entries]
    tests = [test for one in entries for test in one.radii]
    for test, adjusted in zip(tests, paired.holm([test.p for test in tests]), strict=True):
        test.p_holm = adjusted
        test.regresses = paired.regresses(test.lost, test.won, test.images, adjusted, LEVEL, points)
    for one in entries:
        one.wrong += [_loss(test) for test in one.radii if test.regresses]
        if one.wrong and one.verdict == PASSES:
            one.verdict = REGRESSES
    matched = {one.run for one in entries}
    return Report(
        baseline=str(file),
        base=baseline.base,
        level=LEVEL,
        points=points,
        entries=entries,
        not_in_baseline=[str(r.path) for r, _ in finished if str(r.path) not in matched],
        gate=sensitivity([test.images for test in tests], points) if tests else None,
    )


def _judge(
    old: Entry, baseline: Baseline, finished: Sequence[tuple[Record, Entry]], records: Sequence[Record], factor: float
) -> Judgement:
    """Compare one entry with its run: all but the correction of the tests, which is over all entries."""
    wanted = old.key(baseline.any_base)
    same = [(r, new) for r, new in finished if new.key(baseline.any_base) == wanted]
    # Where there are runs of several versions of grid noise, those of the baseline's.
    same = [(r, new) for r, new in same if new.comparable.noise == old.comparable.noise] or same
    if len(same) > 1:
        raise BenchError(f"{' and '.join(str(r.path) for r, _ in same)} both match {old.name}; move one away")
    if not same:
        return _missing(old, baseline, [new for _, new in finished], [r for r in records if not r.complete])
    record, new = same[0]
    trusted(record.path)
    found = Judgement(old.name, run=str(record.path))
    equal = _check_counts(old, new, found)
    _compare_costs(old, new, equal, found)
    _compare_seconds(old, new, factor, found)
    now = {one.image: one.radius for one in new.images}
    pairs = [(one.radius, now[one.image]) for one in old.images]
    found.radii = [_test(radius, pairs) for radius in old.radii]
    return found


def _missing(old: Entry, baseline: Baseline, finished: Sequence[Entry], unfinished: Sequence[Record]) -> Judgement:
    """Report how the nearest run differs from an entry without a run, and the command that creates one."""
    wanted, loose = old.key(baseline.any_base), baseline.any_base
    others = [differing(wanted, new.key(loose)) for new in finished if new.method.name == old.method.name]
    nearest = sorted(others, key=len)[:1]
    reasons = [f"the nearest run differs: {'; '.join(fields)}" for fields in nearest] or ["No matching run found."]
    paths = [r.path for r in unfinished if r.identity.defense.name == old.method.name]
    reasons += [f"{path} is unfinished" for path in paths]
    reasons.append(f"Create it with: {old.command}")
    return Judgement(old.name, NOT_COMPARABLE, wrong=reasons)


def _test(radius: float, pairs: Sequence[tuple[float | None, float | None]]) -> RadiusTest:
    held = [tuple(r is not None and r >= radius for r in pair) for pair in pairs]
    lost, won = held.count((True, False)), held.count((False, True))
    return RadiusTest(
        radius=radius,
        images=len(held),
        before=sum(a for a, _ in held),
        now=sum(b for _, b in held),
        lost=lost,
        won=won,
        p=paired.loss(lost, won),
    )


def _check_counts(old: Entry, new: Entry, found: Judgement) -> bool:
    """Return whether counts must be equal, and are."""
    if old.identity.sha256 != new.identity.sha256:
        other = [k for k in ("source", "weights", "parts") if getattr(old.identity, k) != getattr(new.identity, k)]
        other += ["base"] if old.comparable.base != new.comparable.base else []
        versions = [one.comparable.noise.grid_version for one in (old, new)]
        other += [f"noise ({versions[1]}, was {versions[0]})"] if versions[0] != versions[1] else []
        found.notes.append(f"counts may differ: other {', '.join(other) or 'settings found by search'}")
        return False
    machine, machine_now = old.environment.as_json(), new.environment.as_json()
    if other := [k for k in machine if machine[k] != machine_now[k]]:
        found.notes.append(f"same identity, but counts not compared: versions or machine differ ({', '.join(other)})")
        return False
    for was, now in zip(old.images, new.images, strict=True):
        if was != now:
            found.wrong.append(
                f"not reproduced: image {now.image} has {now.top_count} of {now.n} votes and radius {now.radius}, had "
                f"{was.top_count} of {was.n} and {was.radius}, by the same identity on the same machine and versions"
            )
            return False
    found.notes.append("counts are equal on every image, as they must be for the same identity, machine and versions")
    return True


def _compare_costs(old: Entry, new: Entry, equal: bool, found: Judgement) -> None:
    """Compare costs exactly, except for what chance or another version of torch may change."""
    sampling = old.comparable.sampling
    drawn = not equal and (sampling.kind != "fixed" or sampling.target == "correct")
    same_machine = old.environment == new.environment
    was, is_now = old.cost.as_json(), new.cost.as_json()
    for key, before in was.items():
        now = is_now[key]
        if key == "vote_in_calibrations" or before == now:
            continue
        change = f"{key.replace('_', ' ')}: {number(now)}, was {number(before)}"
        if before is None or now is None:
            found.notes.append(f"{change}: not compared")
        elif key == "votes" and drawn:
            found.notes.append(f"{change}: not judged, since the votes of this procedure follow from its counts")
        elif key == "flops_per_vote" and not same_machine:
            found.notes.append(f"{change}: not judged, since other versions may count other operations")
        elif now > before:
            found.wrong.append(f"costs more: {change}")
        else:
            found.notes.append(f"costs less: {change}")


def _compare_seconds(old: Entry, new: Entry, factor: float, found: Judgement) -> None:
    """Compare seconds a vote. A calibration corrects for the load of a machine, not for another processor."""
    before, now = old.cost.vote_in_calibrations, new.cost.vote_in_calibrations
    unit = "in units of a calibration timed with it"
    one, other = old.environment, new.environment
    if (one.device, one.threads) != (other.device, other.threads):
        found.notes.append("seconds not compared: another processor or number of threads")
    elif before is None or now is None:
        found.notes.append("seconds not compared: one of the runs has no calibration (it was resumed, or is older)")
    elif now > factor * before:
        found.warnings.append(f"a vote takes {now / before:.2f} times as long as before, {unit}")
    elif before > factor * now:
        found.notes.append(f"a vote takes {now / before:.2f} of the time before, {unit}")


def number(value: float | None) -> str:
    """Return a cost as text."""
    return "unknown" if value is None else f"{value:,.10g}"


def _loss(test: RadiusTest) -> str:
    return (
        f"certified at r = {test.radius:g}: {test.now} of {test.images} images, were {test.before}: "
        f"{test.lost} lost, {test.won} won, p {test.p_holm:.2g} after Holm's correction"
    )
