"""A report for a terminal: the verdict, a table at most 100 columns wide, and what it cannot show."""

from __future__ import annotations

import io
import shutil
import textwrap

import pandas as pd
from rich.console import Console
from rich.table import Table as Grid

from bench.errors import shown
from bench.report import attacked
from bench.report.envelopes import Envelope
from bench.report.published import heading as published_heading
from bench.report.shift import Shift
from bench.report.tables import Report, Table

WIDTH = 100


def render(report: Report) -> str:
    """Lay out all tables with their default columns, then the best-sigma curves and the splits compared."""
    parts = [*map(_table, report.tables), *map(_envelope, report.envelopes), *map(_shift, report.shifts)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    flagged = [f"{m.label}: {m.row.flags}" for m in table.methods if m.row.flags]
    notes = [f"{table.few.note} {table.notes}", *flagged]
    parts = [table.setting.heading, table.verdict, None, *notes]
    if len(table.published):
        parts += [published_heading(table.setting)]
    text = [_grid(table.few.cells) if part is None else _prose(part) for part in parts if part != ""]
    return "\n\n".join([*text, *([_grid(table.published)] if len(table.published) else []), *_attacks(table)])


def _attacks(table: Table) -> list[str]:
    """Lay out certified and attacked accuracy, with the budgets of the attacks."""
    shown = table.attacks.shown
    if not shown:
        return [_prose(table.attacks.note)] if table.attacks else []
    grid = _grid(attacked.cells(shown).drop(columns=attacked.BUDGET))
    return [f"{attacked.TITLE}:", grid, _prose(attacked.budgets(shown)), _prose(table.attacks.note)]


def _envelope(envelope: Envelope) -> str:
    if not envelope.curves:
        return _prose(envelope.note)
    return "\n\n".join([_prose(envelope.heading), _grid(envelope.cells()), _prose(envelope.note)])


def _shift(shift: Shift) -> str:
    grids = [part for title, cells in shift.cells() for part in (f"{title}:", _grid(cells))]
    return "\n\n".join([_prose(shift.title), *grids, _prose(shift.note)])


def _prose(text: str) -> str:
    return textwrap.fill(shown(text), min(WIDTH, shutil.get_terminal_size().columns), break_on_hyphens=False)


def _grid(cells: pd.DataFrame) -> str:
    """Lay out cells, the first column to the left; a cell too wide for its column goes on in the next line."""
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
    for i, title in enumerate(map(str, cells)):
        grid.add_column(_safe(title), justify="right" if i else "left", overflow="fold")
    for row in cells.itertuples(index=False):
        grid.add_row(shown(str(row[0])), *map(_safe, row[1:]))  # the first is a name from a record
    console = Console(file=io.StringIO(), width=WIDTH, markup=False, highlight=False, emoji=False, color_system=None)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _safe(cell: object) -> str:
    """Escape what a terminal would execute, line by line."""
    return "\n".join(map(shown, str(cell).split("\n")))
