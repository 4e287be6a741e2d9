"""Commands that exchange records with others: import of released logs, export of logs, records and weights."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import RUNS, print_report, with_options
from bench.errors import BenchError, note
from bench.options import option

app = typer.Typer(rich_markup_mode=None)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What ``bench import`` takes."""

    log: Path = option("A released log: tab-separated, with a header and one line per image.", positional=True)  # noqa: RUF009
    dataset: str = option("A card's name, ./card.toml, or the name of any other data set.")
    sigma: float | None = option(
        "Noise of the certificates, in pixels of [0, 1]. Default of this and the next six: as the log states.", None
    )
    alpha: float | None = option("Failure probability of each certificate.", None)
    n: int | None = option("Votes that bound the probability; with adaptive sampling their maximum.", None)
    n0: int | None = option("Votes that select the class; not stated: unknown.", None)
    noise: str | None = option("float, or grid: rounded to the pixel grid; not stated: float.", None)
    target: str | None = option(
        "selected: the class chosen on n0 votes, label: the known label, or correct: chosen, and stopped where it "
        "is not the label; not stated: selected.",
        None,
    )
    format: str | None = option("cohen: n votes an image; adaptive: their number varies; not stated: cohen.", None)
    radius: float | None = option("The tested radius, if an adaptive log states only whether it was certified.", None)
    out: Path = option("Folder of run folders.", RUNS)  # noqa: RUF009 - it makes a field
    as_json: bool = option("Print JSON to stdout.", False, flag="--json")


@app.command("import")
@with_options(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Import a released log as a run folder. Exit 1: the log has defects; it is imported nevertheless."""
    from bench.records import importing
    from bench.report import tables
    from bench.runs.remarks import LARGE, large

    given = {k: getattr(options, k) for k in ("sigma", "alpha", "n", "n0", "noise", "target", "format", "radius")}
    parameters = importing.parameters_of(options.log, options.dataset, **given)
    if parameters.sigma > LARGE:
        note(large("--sigma", parameters.sigma))
    record = importing.import_log(options.log, parameters, options.out)
    if options.as_json:
        print(json.dumps({"path": str(record.path), **record.info.as_json()}, indent=1))
    else:
        print_report(tables.build([record]))
        print(f"\nimported as {record.path}")
    if record.flags:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(help="A run folder; with --record also a folder of runs, or hub:OWNER/NAME to download."),
    ],
    out: Annotated[Path | None, typer.Option(help="The file to write the log to. Default: print.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write copies of the records into this folder instead: run.json and compressed certificates, "
            "without weights, logs and paths of this machine."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Write the weights instead, with a model card: a folder, of peft for lora, else of timm; or "
            "FILE.safetensors."
        ),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="With --weights: merge lora's adapters into a folder of timm.")
    ] = False,
    defense: Annotated[
        str | None, typer.Option(help="./file.py of the record's defense. A file is executed only if it is named here.")
    ] = None,
    device: Annotated[str, typer.Option(help="With --weights: auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Export a run as a tab-separated log, its weights for peft and timm, or its record for a repository.

    Exit 1: some runs of a folder were left out.
    """
    from bench.io.files import write_text, writing
    from bench.records.logs import export_log
    from bench.records.record import read_run

    if len([x for x in (out, weights, record) if x is not None]) > 1:
        raise BenchError("--out writes the log, --weights the weights and --record the record; give one of them")
    if record is not None:
        _copy_records(run, record)
        return
    if weights is not None:
        _export_weights(run, weights, merged, defense, device)
        return
    text = export_log(read_run(run))
    if out is None:
        print(text, end="")
        return
    with writing(out, "choose another file with --out"):
        write_text(out, text)
    print(f"wrote {out}", file=sys.stderr)


def _copy_records(runs: Path, out: Path) -> None:
    from bench.publishing.reading import locate
    from bench.records.copying import copy_record
    from bench.records.record import find_runs, read_run

    place, left_out = locate(runs), 0
    paths = find_runs(place.path) or [place.path]
    for path in paths:
        try:
            folder, changed = copy_record(read_run(path), out)
        except BenchError as e:
            if len(paths) == 1:
                raise
            note(f"left out: {e}")
            left_out += 1
            continue
        for line in changed:
            note(f"{folder}: {line}")
        print(f"wrote {folder}", file=sys.stderr)
    if left_out:
        raise typer.Exit(1)


def _export_weights(run: Path, weights: Path, merged: bool, defense: str | None, device: str) -> None:
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device
    from bench.runs import exporting
    from bench.runs.rebuilding import UntrainedReporter
    from bench.runs.session import Session

    record = exporting.finished(run)
    reporter = UntrainedReporter(ConsoleReporter(), record)
    session = Session(pick_device(device), run.parent, reporter)
    for file in exporting.export_weights(record, session, weights, merged, defense):
        print(f"wrote {file}", file=sys.stderr)
