"""The report model: everything that the renderers show of run folders, computed once.

Runs share a table only if they differ in nothing but the defense and its seed (``records.grouping``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.errors import BenchError
from bench.records import audit, grouping, metrics, paired
from bench.records.record import Record, find_runs, read_run
from bench.records.study import Study
from bench.report import attacked, default, envelopes, published, rows, shift
from bench.report.attacked import Attacks
from bench.report.cells import cells, label, notes, verdict
from bench.report.default import Columns
from bench.report.envelopes import Envelope
from bench.report.rows import Method, Row, Setting
from bench.report.shift import Shift


@dataclass(frozen=True)
class Table:
    """Runs that may be compared, with their numbers and the same as text."""

    setting: Setting
    runs: list[Row]  # one a run, the best first
    methods: list[Method]  # one a method, the best first
    cells: pd.DataFrame  # text of all columns, a row a method
    few: Columns  # those shown by default
    verdict: str
    notes: str
    published: pd.DataFrame  # text, a row a published method and setting; empty if not asked for
    attacks: Attacks

    def frame(self) -> pd.DataFrame:
        """Return the numbers, a row a run, as csv and json have them."""
        return pd.DataFrame([run.columns() for run in self.runs])


@dataclass(frozen=True)
class Report:
    """All tables, by data set, split and sigma, the best-sigma curves over them, and the comparison of test parts."""

    tables: list[Table]
    envelopes: list[Envelope]
    shifts: list[Shift]
    study: Study | None = None  # whose runs these are


def load_records(root: Path) -> tuple[list[Record], list[str]]:
    """Load the finished runs below ``root`` whose certificates hold, and a line for each run left out."""
    return load(find_runs(root))


def load(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Load those of some runs that ``load_records`` would."""
    records, left_out = [], []
    for path in paths:
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


def build(records: Sequence[Record], with_published: bool = False, study: Study | None = None) -> Report:
    """Build the report of finished runs; ``with_published`` adds published results to each table."""
    tables = [_table(g, with_published) for g in grouping.groups(records)]
    return Report(tables, envelopes.find(records), shift.find(records), study)


def _table(group: Sequence[Record], with_published: bool) -> Table:
    setting = rows.read_setting(group)
    runs = {id(r): rows.read_row(r, setting.radii) for r in group}
    pooled = [(rows.pool([runs[id(r)] for r in seeds], seeds), seeds) for seeds in grouping.methods(group)]
    pooled = [pooled[i] for i in rows.ordered([row for row, _ in pooled])]
    level = [(r, place) for r in setting.within for place in _level(r, pooled)]
    named = grouping.short_names([seeds[0] for _, seeds in pooled])
    names = [name for name, _ in named]
    methods = [
        Method(label(name, names, row), name, training, row, seeds, frozenset(r for r, place in level if place == i))
        for i, ((row, seeds), (name, training)) in enumerate(zip(pooled, named, strict=True))
    ]
    by_run = list(runs.values())
    return Table(
        setting=setting,
        runs=[by_run[i] for i in rows.ordered(by_run)],
        methods=methods,
        cells=cells(setting, methods),
        few=default.columns(setting, methods),
        verdict=verdict(setting, methods),
        notes=notes(setting, methods),
        published=published.rows_for(setting) if with_published else pd.DataFrame(),
        attacks=attacked.find(methods),
    )


def _level(radius: float, pooled: Sequence[tuple[Row, list[Record]]]) -> set[int]:
    """Find the rows whose certified accuracy at a radius is not significantly below the best's, the best among them.

    Paired tests on the images at the 5% level, with Holm's correction over all pairs of rows. Empty if all others are
    significantly worse, or there are none.
    """
    held = [[metrics.by_index(r.certificates)[1] >= radius for r in seeds] for _, seeds in pooled]
    right = [np.array(seeds).sum(axis=0, dtype=np.int64) for seeds in held]
    best = int(np.argmax([row.certified[radius].value for row, _ in pooled]))
    tests = paired.worse_than_best(right, [len(seeds) for seeds in held], best)
    level = {i for i, p in enumerate(tests) if p >= paired.LEVEL}
    return level if len(level) > 1 else set()
