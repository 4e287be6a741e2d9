"""Parts that the commands share: options, and how findings and tables are printed."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bench.errors import BenchError, shown, unknown
from bench.options import flag, option

if TYPE_CHECKING:
    from bench.records.findings import Finding
    from bench.report.tables import Report

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
RUNS = Path("runs")
COLUMNS = "default: at most eight; or all. JSON and csv always have all."
Out = Annotated[Path, typer.Option("--out", help="Folder of run folders.")]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How ``bench run`` is executed; none of it decides what is certified, except the kind of device."""

    device: str = option("auto, cpu, cuda or mps.", "auto")
    shard: str | None = option("i/k: certify the i-th of k shares of the images; bench merge joins them.", None)
    timeout: float = option(
        "Seconds that a block of votes or a training step may take; 0: no limit.", 1800.0, minimum=0
    )
    out: Path | None = option(  # noqa: RUF009 - it makes a field
        "Folder of run folders. Default: runs; of a study, runs beside its file.", None
    )
    executor: str = option(
        "local: in this process, on all visible GPUs; ray: on a Ray cluster (certbench[ray]).", "local"
    )
    ray_address: str | None = option("The Ray cluster; default: the one running here, else one for the command.", None)
    dry_run: bool = option("Estimate votes and time, then exit.", False)
    columns: str = option(f"Columns of the table. {COLUMNS}", "default")
    as_json: bool = option("Print JSON to stdout.", False, flag="--json")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """A study file of ``bench run``: to be run, or to be written."""

    study: Path | None = option(  # noqa: RUF009 - it makes a field
        "A study file, STUDY.toml: runs with shared defaults, in place of the options that decide what is certified.",
        None,
        positional=True,
    )
    save_study: Path | None = option(  # noqa: RUF009 - it makes a field
        "Write the options of this command to a study file; runs nothing.", None, metavar="<path>"
    )


def with_options(*kinds: type[Any], instead: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function that takes one object of each dataclass of ``option`` fields.

    Every field is an option or a positional argument of the command. ``instead``: the field of another kind that may be
    given in place of all options of the first kind, whose object is then None.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(context: typer.Context, **given: Any) -> None:
            objects: list[Any] = []
            for kind in kinds:
                if instead and kind is kinds[0] and _replaced(kind, instead, context, given):
                    objects.append(None)
                else:
                    objects.append(kind(**{f.name: _value(f, given[f.name]) for f in fields(kind)}))
            function(*objects)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY, annotation=typer.Context)]
        for kind in kinds:
            optional = instead is not None and kind is kinds[0]
            parameters += [_parameter(f, get_type_hints(kind)[f.name], optional) for f in fields(kind)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
        return command

    return decorate


def _replaced(kind: type[Any], instead: str, context: typer.Context, given: dict[str, Any]) -> bool:
    """Whether ``instead`` is given. Raises BenchError where options of the kind are too, or required ones are not."""
    if given[instead] is None:
        lacking = [flag(f) for f in fields(kind) if f.default is MISSING and given[f.name] is None]
        if lacking:
            raise BenchError(f"missing option {lacking[0]}; or give a file in place of options: bench run STUDY.toml")
        return False
    if given[instead].suffix != ".toml":  # probably a second value of an option, for which there is a hint
        raise typer.BadParameter(f"unexpected extra argument ({given[instead]}); a study file is a .toml file")
    for one in fields(kind):
        source = context.get_parameter_source(one.name)
        if source is not None and source.name != "DEFAULT":
            raise BenchError(
                f"{flag(one)} beside {given[instead]}: a study is run as its file says, so that results and file "
                f"agree; write the option into the file"
            )
    return True


def _parameter(one: Field[Any], type_: Any, optional: bool = False) -> inspect.Parameter:
    repeatable = type_ == tuple[str, ...]
    metadata = one.metadata
    help_ = metadata["help"] + (" Required without a study." if optional and one.default is MISSING else "")
    if metadata["positional"]:
        described = typer.Argument(help=help_)
    else:
        described = typer.Option(flag(one), help=help_, metavar=metadata["metavar"], min=metadata["minimum"])
    if one.default is MISSING:
        default: Any = None if optional else inspect.Parameter.empty
        type_ = type_ | None if optional else type_
    else:
        default = None if repeatable else one.default
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[list[str] | None if repeatable else type_, described],
    )


def _value(one: Field[Any], given: Any) -> Any:
    """Return an option's value as its field has it: typer gives a list, or None, for a tuple."""
    return tuple(given or ()) if isinstance(one.default, tuple) else given


def print_findings(findings: list[Finding], as_json: bool) -> None:
    """Print each check on its line, a problem below it; exit 1 if there is one."""
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    else:
        for f in findings:
            print(shown(f"FAIL: {f.check}" if f.problem else f"ok:   {f.check}"))
            if f.problem:
                print(shown(f"      {f.problem}"))
    if any(f.problem for f in findings):
        raise typer.Exit(1)


def every_column(columns: str) -> bool:
    """Return whether ``--columns`` asks for all columns. Raises BenchError where it is neither default nor all."""
    if columns not in (known := ("default", "all")):
        raise unknown("--columns", columns, known)
    return columns == "all"


def print_report(report: Report, format: str = "md", every: bool = False, wide: bool = False) -> None:
    """Print a report; on a terminal a table of markdown is laid out for it, unless ``wide`` or all columns are asked.

    Written to a pipe or a file it is markdown.
    """
    from bench.report import terminal, text

    if format == "md" and sys.stdout.isatty() and not every and not wide:
        print(terminal.render(report), end="")
    else:
        print(text.render(report, format, every), end="")


def print_table(rows: list[dict[str, Any]], nothing: str) -> None:
    """Print one line a row, keys are the columns; ``nothing`` where there is none."""
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
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:  # do not wrap piped output
        console.width = 300
    console.print(grid)
