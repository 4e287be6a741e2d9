"""The command that looks into the trained functions of runs: ``bench inspect``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import AsJson, print_table
from bench.errors import BenchError, Interrupted

app = typer.Typer(rich_markup_mode=None)


@app.command()
def inspect(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of one data set, split and sigma.")],
    out: Annotated[Path, typer.Option(help="Folder for the page inspect.html and the data beside it.")],
    images: Annotated[
        int, typer.Option(help="Images to measure, evenly from those that all runs certified; at most 6 are pictured.")
    ] = 6,
    defense: Annotated[
        str | None, typer.Option(help="./file.py of the records' defense. A file is executed only if it is named here.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show where runs look, the loss around images, and how gradients align with the data, as a page and numbers."""
    from bench.inspection import cam, subjects

    cam.require_package()
    if out.exists() and not out.is_dir():
        raise BenchError(f"{out} is a file; name a folder with --out")
    records = subjects.read(runs)
    indices = subjects.images(records, images)

    from bench.inspection import output
    from bench.inspection.measure import inspect as measured
    from bench.inspection.numbers import NUMBERS, printed
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device

    where, terminal = pick_device(device), ConsoleReporter()
    try:
        rebuilt = subjects.rebuild_all(records, where, terminal, defense)
        denoiser = subjects.denoiser(rebuilt, where, terminal)
        with terminal.measuring(f"inspect {len(rebuilt)} runs") as progress:
            found = measured(rebuilt, indices, denoiser, progress)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written: repeat the command") from None
    for file in output.write(found, out):
        print(f"wrote {file}", file=sys.stderr)
    if as_json:
        print(json.dumps(output.summary(found), indent=1))
        return
    print_table(
        [{"run": r.subject.label} | {n.title: printed(r.summary(n)) for n in NUMBERS} for r in found.results], ""
    )
