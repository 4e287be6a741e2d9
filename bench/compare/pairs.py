"""Two or more runs on the same images, side by side: which is better, by how much, and is it chance?

Every number is from the records. Base and defense may differ, and the output says which of their
settings do; whatever else decides a certified accuracy must agree, or nothing is compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.errors import BenchError, NotComparable, note
from bench.io.files import digest
from bench.records import audit, grouping, metrics, paired
from bench.records.record import Line, Record, find_runs, read_run
from bench.smoothing import bounds
from bench.text import DASH, escape

TOP = 5  # images shown each way
COSTS = {
    "train_seconds": "train (s)",
    "certify_seconds": "certify (s)",
    "votes": "votes",
    "flops_per_vote": "FLOPs / vote",
    "trained_here": "trained here (parameters)",
}


def groups(paths: Sequence[Path]) -> list[list[Path]]:
    """What to compare with what: the runs given or, of a folder of runs, its finished ones that are comparable.

    Runs of a folder that are left out are named in a note. Raises BenchError where nothing is left.
    """
    found = [(path, find_runs(path) if not (path / "run.json").exists() else []) for path in paths]
    if not any(inner for _, inner in found):
        return [list(paths)]  # ``compare`` says what is wrong with each
    chosen: dict[str, list[Path]] = {}
    for path in dict.fromkeys(run for given, inner in found for run in inner or [given]):
        try:
            record = read_run(path)
            problem = audit.problem(record)
        except BenchError as e:
            problem = str(e)
        if problem:
            note(f"left out: {problem}")
            continue
        labels = [column.tolist() for column in _labels(record)]
        chosen.setdefault(digest([_terms(record.identity), labels]), []).append(path)
    for (alone,) in (runs for runs in chosen.values() if len(runs) == 1):
        note(f"left out: {alone}: no other run is on the same images with the same sigma, noise and procedure")
    several = [runs for runs in chosen.values() if len(runs) > 1]
    if not several:
        raise BenchError(f"{', '.join(map(str, paths))}: no two finished runs that are comparable")
    return several


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """All pairs of the runs, tested at every radius of the card's grid within reach.

    Raises NotComparable with the reason, and BenchError if a run cannot be read, is unfinished or does not hold.
    """
    if len(paths) < 2 or len({p.resolve() for p in paths}) < len(paths):
        raise BenchError("compare takes two or more different run folders")
    records = [read_run(path) for path in paths]
    for record in records:
        if problem := audit.problem(record):
            raise BenchError(problem)
    unknown = _check(records)
    radii = _radii(records)
    pairs = [_pair(records, i, j, radii) for i, j in itertools.combinations(range(len(records)), 2)]
    tests = [row for pair in pairs for row in pair["radii"]]
    for row, adjusted in zip(tests, paired.holm([row["p"] for row in tests]), strict=True):
        row["p_holm"] = adjusted
    settings = [_settings(r.identity) for r in records]
    keys = sorted({k for s in settings for k in s})
    return {
        "setting": grouping.setting(records[0]),
        "runs": [
            {"run": str(r.path), "defense": grouping.method_name(r), "flags": r.flags, "cost": _costs(r)}
            for r in records
        ],
        "unknown": unknown,
        "differs": {k: values for k in keys if not _same(values := [s.get(k) for s in settings])},
        "pairs": pairs,
    }


def _terms(identity: dict[str, Any]) -> dict[str, Any]:
    """What must agree: all that decides a certified accuracy but base and defense. None where not known."""
    terms = {k: identity[k] for k in ("dataset", "split", "indices", "images", "sigma", "bound")}
    # The rest of the noise follows from its kind and the images' levels.
    return terms | {"noise": identity["noise"]["kind"]} | flat(identity["procedure"], "procedure.")


def _settings(identity: dict[str, Any]) -> dict[str, Any]:
    """The rest, which may differ and is then said."""
    settled = {"dataset", "card", "split", "indices", "images", "sigma", "noise", "procedure", "bound"}
    return flat({k: v for k, v in identity.items() if k not in settled})


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of inner dictionaries under dotted names."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found


def _same(values: Sequence[Any]) -> bool:
    return all(v == values[0] for v in values)


def _check(records: Sequence[Record]) -> list[str]:
    """Raise NotComparable unless the terms agree; those that an imported record does not know."""
    terms = [_terms(r.identity) for r in records]
    unknown, reasons = [], []
    for key in dict.fromkeys(k for t in terms for k in t):
        known = [t.get(key) for r, t in zip(records, terms, strict=True) if not (r.imported and t.get(key, "") is None)]
        if len(known) < len(records):
            unknown.append(key)
        if not _same(known or [None]):
            reasons.append(_reason(key, [t.get(key) for t in terms]))
    if reasons:
        raise NotComparable(f"not comparable: {'; '.join(reasons)}")
    indices, labels = zip(*map(_labels, records), strict=True)
    if len(other := np.flatnonzero(np.any([row != labels[0] for row in labels], axis=0))):
        said = " and ".join(str(row[other[0]]) for row in labels)
        raise NotComparable(f"not comparable: image {indices[0][other[0]]} is labelled {said}: not the same images")
    return unknown


def _labels(record: Record) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images by rising index, and their labels."""
    indices, labels = (record.certificates.column(name) for name in ("index", "label"))
    order = indices.argsort()
    return indices[order], labels[order]


def _reason(key: str, values: Sequence[Any]) -> str:
    if key == "indices":
        common = set.intersection(*map(set, values))
        return f"images differ ({', '.join(str(len(v)) for v in values)}, of which {len(common)} are common to all)"
    return f"{key} is {' and '.join(map(short, values))}"


def short(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:8]
    text = "not stated" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _radii(records: Sequence[Record]) -> list[float]:
    common = set.intersection(*(set(r.info["radii"]) for r in records))
    radii = sorted(r for r in common if r <= min(map(grouping.reach, records)))
    if not radii:
        raise NotComparable("not comparable: the runs' tables have no radius within reach in common")
    return radii


def _pair(records: Sequence[Record], i: int, j: int, radii: Sequence[float]) -> dict[str, Any]:
    indices, first = metrics.by_index(records[i].certificates)
    _, second = metrics.by_index(records[j].certificates)
    images = len(indices)
    rows = []
    for r in radii:
        a, b = first >= r, second >= r
        only_first, only_second = int(np.sum(a & ~b)), int(np.sum(b & ~a))
        low, high = paired.score_interval(only_first, only_second, images)
        rows.append(
            {
                "radius": r,
                "certified_first": int(np.sum(a)) / images,
                "certified_second": int(np.sum(b)) / images,
                "only_first": only_first,
                "only_second": only_second,
                "difference": (only_second - only_first) / images,
                "low": low,
                "high": high,
                "p": paired.mcnemar(only_first, only_second),
            }
        )
    return {
        "first": i,
        "second": j,
        "radii": rows,
        "first_ahead": _most(records[i], records[j]),
        "second_ahead": _most(records[j], records[i]),
        "cost_ratios": _ratios(_costs(records[i]), _costs(records[j])),
    }


def _most(ahead: Record, behind: Record) -> list[dict[str, Any]]:
    """The images on which one run's radius exceeds the other's most; a wrong or withheld prediction counts as 0."""
    indices, further = metrics.by_index(ahead.certificates)
    lead = further.clip(0) - metrics.by_index(behind.certificates)[1].clip(0)
    found = []
    for k in (-lead).argsort(kind="stable")[:TOP]:  # of equals, those of lower index
        if lead[k] > 0:
            one, other = (_line(record, int(indices[k])) for record in (ahead, behind))
            sides = {"ahead": one, "behind": other}
            found.append(
                {"index": one.index, "label": one.label, "lead": float(lead[k])}
                | {side: {"predicted": c.predicted, "radius": c.radius} for side, c in sides.items()}
            )
    return found


def _line(record: Record, index: int) -> Line:
    """What the record says of one image."""
    return record.certificates[record.certificates.place("index", index)]


def _costs(record: Record) -> dict[str, Any]:
    return {k: record.info["cost"][k] for k in COSTS}


def _ratios(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float | None]:
    """Second to first; None where either is unknown or the first cost nothing."""
    return {k: second[k] / first[k] if first[k] and second[k] is not None else None for k in COSTS}


def markdown(found: dict[str, Any]) -> str:
    """What ``compare`` found, for people."""
    runs = found["runs"]
    labels = [f"run {i} ({escape(run['defense'])})" for i, run in enumerate(runs, 1)]
    parts = [f"## {escape(found['setting'])}"]
    parts.append("\n".join(f"{i}. {escape(run['defense'])}: {escape(run['run'])}" for i, run in enumerate(runs, 1)))
    parts += [f"Run {i} is imported with a flag: {escape(f)}" for i, r in enumerate(runs, 1) for f in r["flags"]]
    if found["unknown"]:
        parts.append(
            f"Not known of an imported run, so not compared: {', '.join(found['unknown'])}. "
            "Images are matched by index and label."
        )
    rows = {k: [escape(short(v)) for v in values] for k, values in found["differs"].items()}
    parts.append("What differs beside the certificates:\n\n" + _table({"setting": list(rows)} | _columns(rows, runs)))
    parts += [_pair_markdown(pair, labels, runs) for pair in found["pairs"]]
    costs = {title: [_number(run["cost"][key]) for run in runs] for key, title in COSTS.items()}
    parts.append("### Cost\n\n" + _table({"": list(costs)} | _columns(costs, runs)))
    parts.append(
        "Difference: second run minus first, in points, with its 95% score interval for paired proportions (Tango "
        "1998; each interval by itself, no correction). "
        "p: McNemar's exact test on the images that only one run certifies; Holm's correction is over "
        f"all {sum(len(p['radii']) for p in found['pairs'])} tests shown. Both are about these two trained models on "
        "images like these: nothing is averaged over seeds of training or noise."
    )
    return "\n\n".join(parts) + "\n"


def _pair_markdown(pair: dict[str, Any], labels: Sequence[str], runs: Sequence[Any]) -> str:
    i, j = pair["first"], pair["second"]
    rows = pair["radii"]
    body = _table(
        {
            "radius": [f"{r['radius']:g}" for r in rows],
            f"run {i + 1}": [f"{r['certified_first']:.1%}" for r in rows],
            f"run {j + 1}": [f"{r['certified_second']:.1%}" for r in rows],
            "difference": [
                f"{100 * r['difference']:+.1f} [{100 * r['low']:+.1f}, {100 * r['high']:+.1f}]" for r in rows
            ],
            f"only run {i + 1}": [str(r["only_first"]) for r in rows],
            f"only run {j + 1}": [str(r["only_second"]) for r in rows],
            "p": [f"{r['p']:.2g}" for r in rows],
            "p, Holm": [f"{r['p_holm']:.2g}" for r in rows],
        }
    )
    text = f"### {labels[i]} against {labels[j]}\n\n{body}"
    images = [(i, j, row) for row in pair["first_ahead"]] + [(j, i, row) for row in pair["second_ahead"]]
    if images:
        columns: dict[str, list[str]] = {
            "image": [str(row["index"]) for _, _, row in images],
            "label": [str(row["label"]) for _, _, row in images],
            "further": [f"run {a + 1} by {bounds.printed_radius(row['lead'])}" for a, _, row in images],
        }
        for k in (i, j):
            sides = [row["ahead" if a == k else "behind"] for a, _, row in images]
            columns[f"run {k + 1}"] = [_side(side) for side in sides]
        text += f"\n\nImages on which they differ most:\n\n{_table(columns)}"
    ratios = [f"{COSTS[k]} x{v:.3g}" for k, v in pair["cost_ratios"].items() if v is not None]
    return text + (f"\n\nCost of run {j + 1} over run {i + 1}: {', '.join(ratios)}." if ratios else "")


def _side(side: dict[str, Any]) -> str:
    if side["predicted"] is None:
        return "abstains"
    return f"{side['predicted']} within {bounds.printed_radius(side['radius'])}"


def _columns(rows: dict[str, list[str]], runs: Sequence[Any]) -> dict[str, list[str]]:
    return {f"run {k + 1}": [values[k] for values in rows.values()] for k in range(len(runs))}


def _number(value: Any) -> str:
    return DASH if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _table(columns: dict[str, list[str]]) -> str:
    return str(pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True))
