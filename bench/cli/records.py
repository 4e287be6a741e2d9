"""Commands that read run folders: report, status, merge, compare, check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.options import COLUMNS, AsJson, every_column, print_report, print_table
from bench.errors import BenchError, NotComparable, shown

app = typer.Typer(rich_markup_mode=None)


@app.command("report")
def report_(
    runs: Annotated[
        Path,
        typer.Argument(
            help="A folder of runs, one run, a study (its file, or the folder of its file), or hub:OWNER/NAME."
        ),
    ] = Path("runs"),
    format: Annotated[
        str | None, typer.Option(help="md, latex, csv, json or html. Default: by the file name in --out, else md.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder or file (.md, .tex, .csv, .json, .html) to write. Default: print, except html; of a study "
            "print, and write report.md and report.html beside its file."
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Add published results below each table, and how they differ.")
    ] = False,
    columns: Annotated[str, typer.Option(help=COLUMNS)] = "default",
) -> None:
    """Report finished runs as tables, with --out also as figures or a page. Exit 1: some runs were left out."""
    from bench.errors import unknown
    from bench.publishing.reading import locate
    from bench.records import study
    from bench.report import loading, output, tables

    every = every_column(columns)
    if format not in (known := (None, "md", "latex", "csv", "json", "html")):
        raise unknown("format", format, filter(None, known))
    asked, format = format, output.format_of(out, format)
    _check_format(format, out, published, every)
    source = locate(runs)
    found = loading.find(source.path)
    if source.source:
        print(f"bench: {source}", file=sys.stderr)
    for line in found.left_out:
        print(f"bench: left out: {shown(line)}", file=sys.stderr)
    if not found.records:
        raise BenchError(f"no finished run in {source}; create one with bench run")
    report = tables.build(found.records, published, found.study)
    if format != "html":
        print_report(report, format, every, wide=asked == "md")
    pages = [(format, out)] if out is not None else []
    if found.study is not None and not pages and not asked and not source.source:
        pages = [(kind, study.home(runs)) for kind in ("md", "html")]
    for kind, place in pages:
        for file in output.write(report, kind, place, found.left_out, every):
            print(f"wrote {file}", file=sys.stderr)
    if found.left_out:
        raise typer.Exit(1)


def _check_format(format: str, out: Path | None, published: bool, every: bool) -> None:
    """Raise BenchError where a format cannot show what is asked for."""
    if published and format not in ("md", "latex"):
        raise BenchError(f"--published works with --format md or latex, not {format}")
    if every and format == "latex":
        raise BenchError("--columns all is too wide for --format latex; use md, or csv and json, which have them all")
    if format == "html" and out is None:
        raise BenchError(
            "an html page has 5 MB, too much for a terminal; write it to a file: --format html --out report.html"
        )


@app.command()
def status(
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show progress, speed, time left and failures of runs, including those of other processes."""
    from bench.records import status

    if not runs.exists():
        raise BenchError(f"no folder {runs}; create runs with bench run")
    rows = status.rows(runs)
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    else:
        print_table(status.table(rows), f"no runs in {runs}")
        print("".join(f"{line}\n" for line in status.notes(rows)), end="")


@app.command()
def merge(
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run's folder.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Join the shards of bench run --shard into whole runs. Exit 1: shards are missing or unfinished."""
    from bench.records import merge

    found = merge.merge(runs)
    for line in found.missing:
        print(f"bench: {shown(line)}", file=sys.stderr)
    if as_json:
        print(json.dumps({"whole": [str(p) for p in found.whole], "missing": found.missing}, indent=1))
    else:
        for path in found.whole:
            print(shown(f"{path}: complete"))
    if found.missing:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders, a folder of runs, or hub:OWNER/NAME.")],
    as_json: AsJson = False,
) -> None:
    """Test which of several runs on the same images is better, at every radius. Exit 3: not comparable."""
    from bench.compare import pairs, pairs_text
    from bench.publishing.reading import locate

    found = [pairs.compare(paths) for paths in pairs.groups([locate(run).path for run in runs])]
    if as_json:
        objects = [one.as_json() for one in found]
        print(json.dumps(objects[0] if len(objects) == 1 else objects, indent=1))
    else:
        print("\n".join(map(pairs_text.markdown, found)), end="")


@app.command()
def check(
    baseline: Annotated[Path, typer.Option(help="The baseline file; --update creates it.")],
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    update: Annotated[
        bool, typer.Option("--update", help="Save these runs as the baseline and print what changed.")
    ] = False,
    any_base: Annotated[
        bool | None,
        typer.Option(
            "--any-base/--same-base",
            help="With --update: allow a base with other weights, such as one retrained on another machine. "
            "Default: as saved in the file, at first the same base.",
        ),
    ] = None,
    points: Annotated[
        float, typer.Option(help="Smallest loss of certified accuracy that fails, in percentage points.")
    ] = 2.0,
    factor: Annotated[float, typer.Option(help="Warn if votes take this many times as long.")] = 1.5,
    as_json: AsJson = False,
) -> None:
    """Compare runs with a saved baseline and fail on regressions.

    Exit 1: a run regresses or is not reproduced; 3: one is missing or not comparable.
    """
    from bench.cli import github
    from bench.compare import check, check_text
    from bench.compare.baseline import update as write_baseline

    if update:
        lines = check_text.changes(write_baseline(baseline, runs, any_base))
        print(json.dumps(lines, indent=1) if as_json else "\n".join([*lines, f"wrote {baseline}"]))
        return
    if any_base is not None:
        raise BenchError("--any-base and --same-base are saved in the baseline; give them with --update")
    found = check.check(baseline, runs, points, factor)
    text = check_text.markdown(found)
    print(json.dumps(found.as_json(), indent=1) if as_json else text, end="\n" if as_json else "")
    github.publish(text, check_text.for_reviewers(found))
    verdicts = {one.verdict for one in found.entries}
    if check.REGRESSES in verdicts:
        raise typer.Exit(1)
    if check.NOT_COMPARABLE in verdicts:
        raise NotComparable(check_text.headline(found))
