"""The command ``bench``. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import errno
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.attack import app as attack_app
from bench.cli.convert import app as convert_app
from bench.cli.exchange import app as exchange_app
from bench.cli.housekeeping import app as housekeeping_app
from bench.cli.inspect import app as inspect_app
from bench.cli.options import (
    RUNS,
    AsJson,
    Execution,
    Out,
    StudyOptions,
    every_column,
    print_findings,
    print_report,
    print_table,
    with_options,
)
from bench.cli.predict import app as predict_app
from bench.cli.publish import app as publish_app
from bench.cli.records import app as records_app
from bench.cli.show import app as show_app
from bench.errors import BenchError, DefenseFault, Interrupted, NotComparable, note, say_loading, shown, unknown
from bench.options import RunOptions, flag
from bench.process import watchdog

if TYPE_CHECKING:  # these import torch
    from bench.cli.studies import StudyProgress
    from bench.records.record import Record
    from bench.records.shards import Shard
    from bench.runs.plan import Plan
    from bench.runs.study import StudyFile

app = typer.Typer(
    help="Compare certified defenses through one certification engine.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # rich would drop [ray] as markup
    pretty_exceptions_enable=False,
)


def main(args: list[str] | None = None) -> None:
    """Run a command: errors that a user can fix are one line; exit codes as in the README."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names in records may not be encodable
            stream.reconfigure(errors="backslashreplace")
    typed = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = app(args=typed, standalone_mode=False)
    except Interrupted as e:
        _fail(str(e), 130)
    except NotComparable as e:
        _fail(str(e), 3)
    except BenchError as e:
        _fail(str(e), 2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _fail(f"cannot write {e.filename or 'a file'}: {e.strerror}; free space, then repeat the command", 2)
    except Exception as e:
        if hasattr(e, "format_message"):  # click's usage errors
            _fail(e.format_message() + hint(typed, e.format_message()), 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


LISTS = tuple(flag(f) for f in fields(RunOptions) if f.metadata["several"])
REPEATED = ("--set", "--search")


def hint(typed: Sequence[str], problem: str) -> str:
    """Explain how to give an option several values, where they were separated by blanks."""
    if "unexpected extra argument" not in problem:
        return ""
    for start, option in enumerate(typed):
        name, equals, value = option.partition("=")
        after = itertools.takewhile(lambda word: not word.startswith("--"), typed[start + 1 :])
        values = [*([value] if equals else []), *after]
        if len(values) > 1 and name in LISTS:
            return f"; separate values with commas: {name} {','.join(v.strip(',') for v in values)}"
        if len(values) > 1 and name in REPEATED:
            return f"; repeat the option for each: {' '.join(f'{name} {v}' for v in values)}"
    return ""


def _fail(message: str, code: int) -> None:
    print(f"bench: {shown(message)}", file=sys.stderr)
    sys.exit(code)


@app.command()
@with_options(RunOptions, Execution, StudyOptions, instead="study")
def run(options: RunOptions | None, execution: Execution, study_options: StudyOptions) -> None:
    """Train (or load) defenses and certify them, as options or a study file say. Repeat the command to resume."""
    say_loading("torch and timm")
    from bench.records.shards import Shard
    from bench.records.writer import check_writable
    from bench.runs import study
    from bench.runs.plan import make_plans
    from bench.runs.remarks import check_effects

    every_column(execution.columns)  # refused before any work
    shard = Shard.parse(execution.shard) if execution.shard else None
    on_ray = _on_ray(execution) and not execution.dry_run
    if on_ray and shard:
        raise BenchError("--shard and --executor ray are two ways to share the work: leave one out")
    if options is None:
        assert study_options.study is not None
        if study_options.save_study is not None:
            raise BenchError("--save-study writes the options of a command, and there is a study file already; copy it")
        file = study.read(study_options.study)
        plans, out = file.plans(), execution.out or study_options.study.parent / RUNS
    else:
        file, plans, out = None, make_plans(options), execution.out or RUNS
        check_effects(plans)
        if study_options.save_study is not None:
            study.save(options, study_options.save_study)
            note(f"bench run {study_options.save_study} makes the runs of this command")
            return
    if execution.dry_run:
        from bench.cli.estimates import print_estimates
        from bench.cli.studies import unfinished

        left = unfinished(file, plans, out) if file else plans
        print_estimates(left, execution.device, shard, execution.as_json)
        return
    records, faults = [], []
    try:
        check_writable(out)
        progress = _study_progress(file, plans, out, execution.device, shard) if file else None
        outcomes = _on_cluster(plans, execution, out) if on_ray else _here(plans, execution, out, shard, progress)
        with watchdog.time_limit(execution.timeout):
            for number, outcome in outcomes:
                if progress:
                    progress.ended(number, outcome)
                if not isinstance(outcome, DefenseFault):
                    records.append(outcome)
                    continue
                faults.append(str(outcome))
                if len(plans) > 1:
                    note(f"run {len(records) + len(faults)} of {len(plans)} failed, the others go on: {outcome}")
    except KeyboardInterrupt:  # caught here, since typer would turn it into a silent exit
        raise Interrupted("interrupted; all certified images are kept: repeat the command to resume") from None
    records = list({record.path: record for record in records}.values())  # plans may prove to be one run
    _print_records(records, execution, out, shard, study_options.study)
    if faults:
        raise BenchError(f"{len(faults)} of {len(plans)} runs failed: {'; '.join(faults)}" if records else faults[0])


def _study_progress(file: StudyFile, plans: list[Plan], out: Path, device: str, shard: Shard | None) -> StudyProgress:
    from bench.cli.studies import StudyProgress  # it estimates times, which takes a while to import

    return StudyProgress(file, plans, out, device, shard)


def _here(
    plans: list[Plan], execution: Execution, out: Path, shard: Shard | None, progress: StudyProgress | None
) -> Iterator[tuple[int, Record | DefenseFault]]:
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device, same_kind
    from bench.runs.session import Session

    device = pick_device(execution.device)
    outcomes = Session(device, out, ConsoleReporter(), shard, same_kind(device)).runs(plans)
    for number in range(len(plans)):
        if progress:
            progress.begin(number)
        yield number, next(outcomes)


def _on_cluster(plans: list[Plan], execution: Execution, out: Path) -> Iterator[tuple[int, Record | DefenseFault]]:
    from bench.cluster.executor import run as run_on_ray
    from bench.process.console import ConsoleReporter

    address, timeout = execution.ray_address, execution.timeout
    return run_on_ray(plans, out, ConsoleReporter(), execution.device, address, timeout)


def _print_records(
    records: list[Record], execution: Execution, out: Path, shard: Shard | None, study: Path | None
) -> None:
    if execution.as_json:
        print(json.dumps([{"path": str(r.path), **r.info.as_json()} for r in records], indent=1))
    elif shard:
        for r in records:
            print(f"{r.path}: complete, {len(r.certificates)} images")
        print(f"bench merge {out} joins the {shard.of} shards when all are complete")
    elif records:
        from bench.records.study import results_file
        from bench.report import tables

        print_report(tables.build(records), every=every_column(execution.columns))
        of = out
        if study:
            of = study if execution.out is None else results_file(out, study.name)
        print(f"\nruns in {out}; bench report {of} makes the report")


def _on_ray(execution: Execution) -> bool:
    """Whether ``--executor`` is ray. Raises BenchError where it is unknown, or Ray is missing or not asked for."""
    executor, address = execution.executor, execution.ray_address
    if executor not in ("local", "ray"):
        raise unknown("--executor", executor, ("local", "ray"))
    if executor == "local":
        if address is not None:
            raise BenchError(f"--ray-address {address}: give --executor ray too")
        return False
    if importlib.util.find_spec("ray") is None:
        raise BenchError("--executor ray: Ray is not installed; pip install 'certbench[ray]'")
    return True


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="defenses, datasets, bases or runs.")] = "defenses",
    out: Out = RUNS,
    as_json: AsJson = False,
) -> None:
    """List defenses, data sets, bases or runs."""
    from bench.cli import listing

    rows = listing.rows(what, out)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print_table(rows, f"no {what}")


@app.command()
def doctor(
    defense: Annotated[str, typer.Argument(help="A defense's name or ./file.py.")],
    dataset: Annotated[str, typer.Option(help="The card whose images and base are used.")] = "digits",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a defense follows the interface, and explain how to fix it. Exit 1 when a check fails."""
    from bench.data.card import first_split
    from bench.data.datasets import load_card
    from bench.runs.doctor import examine
    from bench.runs.plan import make_plans

    split = first_split(load_card(dataset))
    (plan,) = make_plans(RunOptions(defenses=defense, dataset=dataset, split=split, settings=tuple(set_ or ())))
    print_findings(list(examine(plan)), as_json)
    if not as_json:
        print(f"{defense} is ready: bench run --defense {defense} --dataset {dataset}")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"certbench {version('certbench')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """Compare certified defenses through one certification engine."""


app.add_typer(show_app)
app.add_typer(housekeeping_app)
app.add_typer(records_app)
app.add_typer(attack_app)
app.add_typer(exchange_app)
app.add_typer(publish_app)
app.add_typer(convert_app)
app.add_typer(inspect_app)
app.add_typer(predict_app)
