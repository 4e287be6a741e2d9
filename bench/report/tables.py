"""What run folders say, as tables: reads records only, never touches a model.

Runs are put in one table only when they differ in nothing but the defense (and its seed): same
images, base, sigma, n0, n, alpha, procedure. Others get a table of their own. A base of other classes is
the same whether a linear probe was put on it or the defense brought a head.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.errors import BenchError
from bench.records import audit, metrics, paired
from bench.records.grouping import method_name, methods, selects
from bench.records.record import Record, find_runs, read_run


def load_records(root: Path) -> tuple[list[Record], list[str]]:
    """Load the finished runs below ``root`` whose certificates hold, and a line for each run left out."""
    records, left_out = [], []
    for path in find_runs(root):
        try:
            record = read_run(path)
        except BenchError as e:
            left_out.append(str(e))
            continue
        if problem := audit.problem(record):
            left_out.append(problem)
        else:
            records.append(record)
    return records, left_out


def table(group: Sequence[Record]) -> pd.DataFrame:
    """One row a run, ordered by certified accuracy at the grid's radii; every number from the record."""
    frame = pd.DataFrame([_row(r) for r in group])
    order = [f"certified_{r:g}" for r in group[0].info.radii]
    return frame.sort_values([*order, "defense"], ascending=[*[False] * len(order), True], ignore_index=True)


def pooled(group: Sequence[Record]) -> pd.DataFrame:
    """One row a method, ordered as ``table``: seeds of one method pooled, every other number their mean.

    ``certified_R_spread`` is how far apart the lowest and the highest seed are.
    """
    rows = []
    for records in methods(group):
        seeds = [_row(r) for r in records]
        first = dict(seeds[0])
        for column in first:
            if known := [float(x[column]) for x in seeds if isinstance(x[column], int | float)]:
                first[column] = statistics.fmean(known)
        radii = group[0].info.radii
        for r, share in zip(radii, metrics.pooled([r.certificates for r in records], radii), strict=True):
            key = f"certified_{r:g}"
            first |= {key: share.value, f"{key}_low": share.low, f"{key}_high": share.high}
            first[f"{key}_spread"] = max(x[key] for x in seeds) - min(x[key] for x in seeds)
        first["seeds"] = len(records)
        rows.append(first)
    frame = pd.DataFrame(rows)
    order = [f"certified_{r:g}" for r in group[0].info.radii]
    return frame.sort_values([*order, "defense"], ascending=[*[False] * len(order), True], ignore_index=True)


def level_with_best(group: Sequence[Record], frame: pd.DataFrame, radius: float) -> set[str]:
    """Rows whose certified accuracy at a radius is not significantly below the best's, the best among them.

    ``frame`` is the group's ``pooled``. Paired tests on the images at the 5% level, with Holm's correction over
    all pairs of rows. Empty if all others are significantly worse, or there are none.
    """
    by_run = {m[0].path.name: m for m in methods(group)}
    runs = [by_run[run] for run in frame["run"]]
    held = [[metrics.by_index(r.certificates)[1] >= radius for r in seeds] for seeds in runs]
    right = [np.array(seeds).sum(axis=0, dtype=np.int64) for seeds in held]
    best = int(frame[f"certified_{radius:g}"].argmax())
    tests = paired.worse_than_best(right, [len(seeds) for seeds in runs], best)
    level = {str(run) for run, p in zip(frame["run"], tests, strict=True) if p >= paired.LEVEL}
    return level if len(level) > 1 else set()


def _row(record: Record) -> dict[str, Any]:
    info, cost, base = record.info, record.cost, record.info.base
    result = metrics.summarise(record.certificates, info.radii)
    row: dict[str, Any] = {"run": record.path.name, "defense": method_name(record), "seed": record.identity.seed}
    for radius, rate in zip(result.radii, result.certified_accuracy, strict=True):
        key = f"certified_{radius:g}"
        row |= {key: rate.value, f"{key}_low": rate.low, f"{key}_high": rate.high}
    row |= {
        "family": info.defense.family,
        "trains": info.defense.trains,
        "extra_data": ", ".join(info.defense.trained_elsewhere),
        "images": result.images,
        "base_clean_accuracy": base.clean_correct / base.images if base and base.clean_correct is not None else None,
        "abstained": result.abstained.value if selects(record) else None,
        "train_seconds": cost.train_seconds,
        "certify_seconds": cost.certify_seconds,
        "votes": cost.votes,
        "flops_per_vote": cost.flops_per_vote,
        "trainable_nominal": cost.trainable_nominal,
        "trainable_updated": cost.trainable_updated,
        "trained_here": cost.trained_here,
        "trained_elsewhere": cost.trained_elsewhere,
        "parameters": cost.parameters,
        "peak_memory": cost.peak_memory,
        "acr": result.acr,
        "flags": "; ".join(record.flags),
    }
    return row
