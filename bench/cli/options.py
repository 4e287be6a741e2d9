"""What the commands share: options, and how findings are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.errors import shown

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of run folders.")]


def print_findings(findings: list[Any], as_json: bool) -> None:
    """Each check on its line, what is wrong below it; exit 1 when anything is."""
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    else:
        for f in findings:
            print(shown(f"wrong: {f.check}" if f.problem else f"ok:    {f.check}"))
            if f.problem:
                print(shown(f"       {f.problem}"))
    if any(f.problem for f in findings):
        raise typer.Exit(1)


def print_table(rows: list[dict[str, Any]], nothing: str) -> None:
    """One line a row, keys are the columns; ``nothing`` where there is none."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(nothing)
        return
    grid = Table(box=None, pad_edge=False)
    for column in rows[0]:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(shown(str(v)) for v in row.values()))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:  # whoever reads it wants lines whole
        console.width = 300
    console.print(grid)
