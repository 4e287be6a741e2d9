"""``bench.load``: finished runs as data frames, tables, figures, comparisons and classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError, note

if TYPE_CHECKING:  # imported where they are used: pandas, matplotlib and torch are slow to load
    import pandas as pd
    from matplotlib.axes import Axes

    from bench.api.compared import Compared
    from bench.records.record import Record
    from bench.records.study import Study
    from bench.report.tables import Report
    from bench.runs.prediction import SmoothedModel

Source = str | PathLike[str]
Named = int | str | PathLike[str]  # a run: its place in the results, its folder's name, or its path


class Results:
    """Finished runs. A sequence of their records, in the order in which they were found.

    Attributes:
        records: The records.
        left_out: A line for each run that was found and left out, such as an unfinished one.
        study: The study whose runs these are, if they are of one.
    """

    def __init__(self, records: Sequence[Record], left_out: Sequence[str] = (), study: Study | None = None) -> None:
        """Use ``bench.load`` to read results from folders."""
        self.records, self.left_out, self.study = list(records), list(left_out), study

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, place: int) -> Record:
        return self.records[place]

    def __repr__(self) -> str:
        return f"Results of {len(self)} runs: {', '.join(record.path.name for record in self.records)}"

    @cached_property
    def _report(self) -> Report:
        from bench.report import tables

        return tables.build(self.records, study=self.study)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row a run, the best of each table first: what it is, certified accuracies, costs.

        ``table`` numbers the tables: only rows of one table may be compared. ``certified_R`` is the certified accuracy
        at radius R in [0, 1], with its 95% interval in ``certified_R_low`` and ``_high``.
        """
        from bench.report import frames

        return frames.runs(self._report)

    def certificates(self) -> pd.DataFrame:
        """Return one row an image of each run: label, prediction (missing: abstained), radius and counts.

        Of a run with ``target="correct"``, an image whose selected class is wrong has n = 0 and no radius.
        """
        from bench.report import frames

        return frames.certificates(self.records)

    def table(self, *, every: bool = False) -> str:
        """Return the report's tables as markdown; with ``every`` all columns."""
        from bench.report import text

        return text.render(self._report, "md", every)

    def _repr_html_(self) -> str:
        from bench.report import frames

        return frames.html(self._report)

    def plot(self, table: int | None = None, ax: Axes | None = None) -> Axes:
        """Draw certified accuracy against radius with 95% intervals, of the table's first eight rows.

        Args:
            table: Which table, as ``to_pandas`` numbers them; needed where there are several.
            ax: Where to draw. Default: new axes.

        Raises:
            BenchError: There are several tables, and none is named.
        """
        tables = self._report.tables
        if table is None and len(tables) > 1:
            listed = "; ".join(f"{i}: {one.setting.heading}" for i, one in enumerate(tables))
            raise BenchError(f"runs of {len(tables)} tables cannot share a figure; choose one, plot(table=0): {listed}")
        if not 0 <= (table or 0) < len(tables):
            raise BenchError(f"no table {table}; there are {len(tables)}, from 0")
        from bench.report import figures

        if ax is None:
            from matplotlib import pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        one = tables[table or 0]
        drawn, rows = figures.draw_curves(one, ax), len(one.methods)
        shown = f"; the first {drawn} of {rows} rows" if drawn < rows else ""
        ax.set_title(figures.plain(one.setting.heading + shown), fontsize="small", wrap=True)
        ax.legend(title=figures.BANDS, fontsize="small", title_fontsize="small")
        return ax

    def compare(self, first: Named | Record, second: Named | Record) -> Compared:
        """Test which of two runs on the same images is better, at every radius.

        Runs are named by place, name of their folder, path, or record. Raises NotComparable with the reason.
        """
        from bench.api.compared import compared

        return compared([self._record(first).path, self._record(second).path])

    def model(
        self,
        run: Named | Record | None = None,
        *,
        n: int | None = None,
        n0: int | None = None,
        alpha: float | None = None,
        device: str | None = None,
        defense: str | None = None,
        base: str | None = None,
    ) -> SmoothedModel:
        """Rebuild the smoothed classifier of a run, which predicts pictures with certified radii.

        Args:
            run: Which one, if there are several.
            n: Votes that bound the probability; default of this and the next two: the run's.
            n0: Votes that select the class.
            alpha: Failure probability of each certificate.
            device: auto, cpu, cuda or mps; default: the run's.
            defense: ./file.py of the record's defense, which is executed only if it is named.
            base: Address of the record's served base, which is contacted only if it is named.

        Raises:
            BenchError: There are several runs and none is named, or it cannot be rebuilt here.
        """
        if run is None and len(self) > 1:
            raise BenchError(f"{len(self)} runs; name one: model(0), or model({self.records[0].path.name!r})")
        from bench.process.console import ConsoleReporter
        from bench.process.environment import pick_device
        from bench.runs.prediction import Sampling, open_model
        from bench.runs.rebuilding import finished
        from bench.runs.session import Session

        record = finished(self._record(0 if run is None else run).path, "predict with")
        where = pick_device(device or record.identity.device or "auto")
        session = Session(where, record.path.parent, ConsoleReporter())
        return open_model(record, session, Sampling(n0, n, alpha), defense, base)

    def _record(self, run: Named | Record) -> Record:
        from bench.records.record import Record

        if isinstance(run, Record):
            return run
        if isinstance(run, int | Integral):  # numpy's, as a data frame gives them, are Integral alone
            if not -len(self) <= int(run) < len(self):
                raise BenchError(f"no run {run}; there are {len(self)}, from 0")
            return self.records[int(run)]
        found = [r for r in self.records if r.path.name == str(run) or r.path.resolve() == Path(run).resolve()]
        if not found:
            raise BenchError(f"no run {run} among {', '.join(r.path.name for r in self.records)}")
        if len(found) > 1:
            raise BenchError(f"{run} names {len(found)} runs; give a path: {', '.join(str(r.path) for r in found)}")
        return found[0]


def load(source: Source | Record | Sequence[Source | Record] = "runs") -> Results:
    """Load finished runs, each checked as ``bench report`` does.

    Args:
        source: A folder of runs, a run folder, a study's file or folder, hub:OWNER/NAME[@REVISION] of published runs, a
            record of ``bench.run``, or a list of these.

    Returns:
        The results. Runs that are left out, such as unfinished ones, are in ``left_out`` and printed.

    Raises:
        BenchError: No finished run is found.
    """
    from bench.publishing.reading import locate
    from bench.records.record import Record
    from bench.report import loading

    sources = [source] if isinstance(source, str | PathLike | Record) else list(source)
    each = [loading.find(one.path if isinstance(one, Record) else locate(one).path) for one in sources]
    records = [record for found in each for record in found.records]
    left_out = [line for found in each for line in found.left_out]
    for line in left_out:
        note(f"left out: {line}")
    if not records:
        raise BenchError(f"no finished run in {', '.join(str(s) for s in sources) or 'an empty list'}; see bench.run")
    unique = {record.path.resolve(): record for record in records}
    return Results(list(unique.values()), left_out, each[0].study if len(each) == 1 else None)
