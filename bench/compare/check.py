"""``bench check``: do these runs do as well as the baseline's, for no more than they cost?

Accuracy regresses where an exact paired test and a least effect both say so; what does not vary
(votes, forward passes, parameters) is compared exactly; where nothing that decides counts has
changed, they must be equal. One timing a side allows no test, so seconds only warn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.compare.baseline import ANY_BASE, COSTS, entry, read, terms, trusted
from bench.compare.pairs import flat, short
from bench.errors import BenchError
from bench.io.files import digest
from bench.records import paired
from bench.records.record import Record, find_runs, read_run
from bench.text import escape

LEVEL = 0.01  # of a false alarm in any of a baseline's tests
POINTS = 2.0  # the least loss that counts
FACTOR = 1.5  # of seconds, before a warning
CHURN = 0.1  # the share of images that change by chance, for which power is shown
SEEN = 0.8  # the power at which a loss is said to be seen

PASSES, REGRESSES, NOT_COMPARABLE = "passes", "regresses", "not comparable"


def check(file: Path, runs: Path, points: float = POINTS, factor: float = FACTOR) -> dict[str, Any]:
    """Each entry of the baseline against its run in ``runs``.

    Raises BenchError where the baseline cannot be read or two runs answer one entry.
    """
    if not 0 <= points <= 100 or not factor >= 1:
        raise BenchError("--points must lie from 0 to 100, --factor from 1")
    baseline = read(file)
    records = [r for r in map(read_run, find_runs(runs)) if not r.imported]
    finished = [(r, entry(r)) for r in records if r.complete]
    unfinished = [r for r in records if not r.complete]
    answered: set[Path] = set()
    entries = []
    for old in baseline["runs"]:
        wanted = terms(old, baseline["base"])
        same = [(r, new) for r, new in finished if terms(new, baseline["base"]) == wanted]
        if len(same) > 1:
            raise BenchError(f"{' and '.join(str(r.path) for r, _ in same)} are both {old['name']}; move one away")
        if not same:
            new_entries = [new for _, new in finished]
            entries.append(_absent(old, new_entries, unfinished, baseline["base"]))
            continue
        record, new = same[0]
        trusted(record.path)
        answered.add(record.path)
        entries.append(_judged(old, new, factor) | {"run": str(record.path)})
    tests = [row for one in entries for row in one["radii"]]
    for row, adjusted in zip(tests, paired.holm([row["p"] for row in tests]), strict=True):
        row["p_holm"] = adjusted
        row["regresses"] = paired.regresses(row["lost"], row["won"], row["images"], adjusted, LEVEL, points)
    for one in entries:
        one["wrong"] += [_lost(row) for row in one["radii"] if row["regresses"]]
        if one["wrong"] and one["verdict"] == PASSES:
            one["verdict"] = REGRESSES
    return {
        "baseline": str(file),
        "base": baseline["base"],
        "level": LEVEL,
        "points": points,
        "entries": entries,
        "not_in_baseline": [str(r.path) for r in records if r.complete and r.path not in answered],
        "gate": sensitivity([row["images"] for row in tests], points) if tests else None,
    }


def sensitivity(images: Sequence[int], points: float) -> dict[str, Any]:
    """What tests on so many images each find and miss, exactly, at Holm's first and strictest step.

    A false alarm needs a test that falls to the first step's level, so the sum of their chances bounds it.
    """
    level, least = LEVEL / len(images), min(images)
    return {
        "tests": len(images),
        "images": least,
        "false_alarm_at_most": sum(paired.largest_size(n, level) for n in images),
        "false_alarm": sum(paired.power(n, CHURN / 2, CHURN / 2, level, 0.0) for n in images),
        "seen": [{"churn": churn, "points": _seen(least, churn, level, points)} for churn in (0.0, CHURN)],
    }


def _seen(images: int, churn: float, level: float, points: float) -> int | None:
    """The smallest loss, in whole points, found with a chance of at least ``SEEN``; None: not even the largest."""
    for lost in range(1, 101 - round(100 * churn)):
        if paired.power(images, lost / 100 + churn / 2, churn / 2, level, points) >= SEEN:
            return lost
    return None


def _absent(
    old: dict[str, Any], finished: Sequence[dict[str, Any]], unfinished: Sequence[Record], base: str
) -> dict[str, Any]:
    """No run answers the entry: which is nearest and how it differs, or how to make one."""
    wanted = terms(old, base)
    others = [_differing(wanted, terms(n, base)) for n in finished if n["method"]["name"] == old["method"]["name"]]
    nearest = sorted(others, key=len)[:1]
    reasons = [f"the nearest run differs: {'; '.join(fields)}" for fields in nearest] or ["no run of it"]
    names = [r.path for r in unfinished if r.identity["defense"]["name"] == old["method"]["name"]]
    reasons += [f"{path} is unfinished" for path in names]
    reasons.append(f"make it with: {old['command']}")
    found = {"name": old["name"], "verdict": NOT_COMPARABLE, "run": None, "wrong": reasons}
    return found | {"warnings": [], "notes": [], "radii": []}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The fields that differ, those of inner dictionaries by name."""
    a, b = flat(one), flat(other)
    keys = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    return [f"{k} is {_short(b.get(k))}, was {_short(a.get(k))}" for k in keys]


def _short(value: Any) -> str:
    return f"{len(value)} images" if isinstance(value, list) and len(value) > 4 else short(value)


def _judged(old: dict[str, Any], new: dict[str, Any], factor: float) -> dict[str, Any]:
    """All but the tests' correction, which is over all entries."""
    wrong: list[str] = []
    notes: list[str] = []
    warnings: list[str] = []
    equal = _reproduced(old, new, wrong, notes)
    _costs(old, new, equal, wrong, notes)
    _seconds(old, new, factor, warnings, notes)
    first, second = ({image[0]: image[1] for image in one["images"]} for one in (old, new))
    rows = []
    for radius in old["radii"]:
        held = [tuple(r is not None and r >= radius for r in (first[x], second[x])) for x in first]
        lost, won = held.count((True, False)), held.count((False, True))
        rows.append(
            {
                "radius": radius,
                "images": len(held),
                "before": sum(a for a, _ in held),
                "now": sum(b for _, b in held),
                "lost": lost,
                "won": won,
                "p": paired.loss(lost, won),
            }
        )
    return {"name": old["name"], "verdict": PASSES, "wrong": wrong, "warnings": warnings, "notes": notes, "radii": rows}


def _reproduced(old: dict[str, Any], new: dict[str, Any], wrong: list[str], notes: list[str]) -> bool:
    """Whether counts must be equal, and if so, are."""
    if old["identity"]["sha256"] != new["identity"]["sha256"]:
        other = [k for k in ("source", "weights", "parts") if old["identity"][k] != new["identity"][k]]
        other += ["base"] if old["comparable"]["base"] != new["comparable"]["base"] else []
        notes.append(f"counts need not be equal: other {', '.join(other) or 'settings found by search'}")
        return False
    if other := [k for k in old["environment"] if old["environment"][k] != new["environment"][k]]:
        notes.append(f"same identity, but equal counts not checked: versions or machine differ ({', '.join(other)})")
        return False
    for was, now in zip(old["images"], new["images"], strict=True):
        if was != now:
            wrong.append(
                f"not reproduced: image {now[0]} has {now[3]} of {now[2]} votes and radius {now[1]}, had {was[3]} of "
                f"{was[2]} and {was[1]}, by the same identity on the same machine and versions"
            )
            return False
    notes.append("counts are equal on every image, as the same identity on the same machine and versions must give")
    return True


def _costs(old: dict[str, Any], new: dict[str, Any], equal: bool, wrong: list[str], notes: list[str]) -> None:
    """Exactly, but for what chance or another version of torch may move."""
    drawn = not equal and old["comparable"]["procedure"]["kind"] != "fixed"
    same_machine = old["environment"] == new["environment"]
    for key in old["cost"]:
        before, now = old["cost"][key], new["cost"][key]
        if key not in COSTS or before == now:
            continue
        said = f"{key.replace('_', ' ')}: {_number(now)}, was {_number(before)}"
        if before is None or now is None:
            notes.append(f"{said}: not compared")
        elif key == "votes" and drawn:
            notes.append(f"{said}: not judged, since this procedure's votes follow from its counts")
        elif key == "flops_per_vote" and not same_machine:
            notes.append(f"{said}: not judged, since other versions may count other operations")
        elif now > before:
            wrong.append(f"costs more: {said}")
        else:
            notes.append(f"costs less: {said}")


def _seconds(old: dict[str, Any], new: dict[str, Any], factor: float, warnings: list[str], notes: list[str]) -> None:
    """A calibration makes up for the load of a machine, not for another one's instructions."""
    before, now = old["cost"]["vote_in_calibrations"], new["cost"]["vote_in_calibrations"]
    unit = "in units of a calibration timed with it"
    if any(old["environment"][k] != new["environment"][k] for k in ("device", "threads")):
        notes.append("seconds not compared: another processor or number of threads")
    elif before is None or now is None:
        notes.append("seconds not compared: one of the runs has no calibration (it was resumed, or is older)")
    elif now > factor * before:
        warnings.append(f"a vote takes {now / before:.2f} times as long as it did, {unit}")
    elif before > factor * now:
        notes.append(f"a vote takes {now / before:.2f} of the time it did, {unit}")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.10g}"


def _lost(row: dict[str, Any]) -> str:
    return (
        f"certified at r = {row['radius']:g}: {row['now']} of {row['images']} images, were {row['before']}: "
        f"{row['lost']} lost, {row['won']} won, p {row['p_holm']:.2g} after Holm's correction"
    )


def headline(found: dict[str, Any]) -> str:
    """How many entries got which verdict."""
    counts = {v: sum(one["verdict"] == v for one in found["entries"]) for v in (PASSES, REGRESSES, NOT_COMPARABLE)}
    said = ", ".join(f"{verdict} {n}" for verdict, n in counts.items() if n)
    return f"{said}; of {len(found['entries'])} in {found['baseline']}"


def markdown(found: dict[str, Any]) -> str:
    """What ``check`` found, for people."""
    parts = [f"## bench check: {escape(headline(found))}"]
    for one in found["entries"]:
        lines = [f"- wrong: {escape(w)}" if one["run"] else f"- {escape(w)}" for w in one["wrong"]]
        lines += [f"- warning: {escape(w)}" for w in one["warnings"]] + [f"- {escape(n)}" for n in one["notes"]]
        parts.append("\n".join([f"### {one['verdict']}: {escape(one['name'])}", "", *lines]))
        if one["radii"]:
            parts.append(_table(one["radii"]))
    if found["not_in_baseline"]:
        parts.append("Not in the baseline (--update would add them): " + escape(", ".join(found["not_in_baseline"])))
    if found["base"] == ANY_BASE:
        parts.append(
            "This baseline says that its base is trained anew: weights are not required to be the same, so each "
            "entry tests base and defense together. How far a training run moves by itself is in no p-value."
        )
    if found["gate"]:
        parts.append(_gate(found))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("radius", "before", "now", "lost", "won", "p", "p_holm")
    shown = [{k: f"{row[k]:{'g' if k == 'radius' else '.3g'}}" for k in columns} for row in rows]
    return str(pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True))


def _gate(found: dict[str, Any]) -> str:
    gate = found["gate"]
    seen = " or ".join(
        f"{'more than any' if s['points'] is None else s['points']} points where besides it {s['churn']:.0%} of the "
        "images change by chance"
        for s in gate["seen"]
    )
    return (
        f"A regression is a loss of at least {found['points']:g} points with p at most {found['level']:g}, by "
        f"McNemar's exact one-sided test, Holm's correction over all {gate['tests']} tests. Were every change a fair "
        f"coin, the chance of any false alarm is at most {gate['false_alarm_at_most']:.2g} "
        f"({gate['false_alarm']:.2g} where {CHURN:.0%} of the images change). On {gate['images']} images a true loss "
        f"is seen with a chance of at least {SEEN:.0%} from {seen}; smaller ones may pass."
    )


def findings(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Level, title and message of each thing a reviewer should see."""
    rows = []
    for one in found["entries"]:
        rows += [("error", f"{one['verdict']}: {one['name']}", escape(w)) for w in one["wrong"]]
        rows += [("warning", one["name"], escape(w)) for w in one["warnings"]]
    return rows


def changes(old: dict[str, Any] | None, new: dict[str, Any]) -> list[str]:
    """What ``--update`` changed, a line an entry."""
    before, after = ({digest(terms(e, ANY_BASE)): e for e in b["runs"]} if b else {} for b in (old, new))
    lines = [f"removed: {one['name']}" for key, one in before.items() if key not in after]
    for key, one in after.items():
        was = before.get(key)
        if was is None:
            lines.append(f"added: {one['name']}: {_summary(one)}")
        elif was["sha256"] != one["sha256"]:
            fields = [{k: v for k, v in e.items() if k not in ("images", "sha256")} for e in (was, one)]
            said = [f"{_summary(one)}; was {_summary(was)}"] if was["images"] != one["images"] else []
            lines.append("; ".join([f"changed: {one['name']}: ", *said, *_differing(*fields)]).replace(": ; ", ": "))
        else:
            lines.append(f"unchanged: {one['name']}")
    if old and old["base"] != new["base"]:
        lines.append(f"base: {new['base']}, was {old['base']}")
    return [escape(line) for line in lines]


def _summary(one: dict[str, Any]) -> str:
    held = [(r, sum(i[1] is not None and i[1] >= r for i in one["images"])) for r in one["radii"]]
    shares = ", ".join(f"{n} at r = {r:g}" for r, n in held)
    return f"of {len(one['images'])} images {shares}; {_number(one['cost']['votes'])} votes"
