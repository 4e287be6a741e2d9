"""The command ``bench``. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.errors import BenchError, Interrupted, NotComparable

app = typer.Typer(
    help="Compare certified defenses through one certification engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of run folders.")]


def main(args: list[str] | None = None) -> None:
    """Entry point: errors a user can mend are one line; exit codes as in the README."""
    try:
        code = app(args=args, standalone_mode=False)
    except Interrupted as e:
        _fail(str(e), 130)
    except NotComparable as e:
        _fail(str(e), 3)
    except BenchError as e:
        _fail(str(e), 2)
    except Exception as e:
        if hasattr(e, "format_message"):  # click's usage errors
            _fail(e.format_message(), 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"bench: {message}", file=sys.stderr)
    sys.exit(code)


@app.command()
def run(
    defense: Annotated[
        str, typer.Option(help="Names or ./file.py, with commas between, or all that the card has a base for.")
    ],
    dataset: Annotated[str, typer.Option(help="A card's name or ./card.toml.")],
    sigma: Annotated[
        str, typer.Option(help="Noise of the certificate, in pixels of [0, 1]; several with commas.")
    ] = ".25",
    train_sigma: Annotated[float | None, typer.Option(help="Noise while training; default: sigma.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The card's recipe, timm:MODEL, hf-hub:OWNER/NAME, a .safetensors file, a timm folder or "
            "http://HOST/v2/models/NAME; default: the card's for the preset."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Certify these weights of the defense (of the base, for none); train nothing.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="quick, standard or paper; default: the card's.")] = None,
    examples: Annotated[str | None, typer.Option(help="N images, class-balanced, or every:K.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Votes that bound the probability, per image.")] = None,
    n0: Annotated[int | None, typer.Option("--n0", help="Votes that select the class, per image.")] = None,
    alpha: Annotated[float, typer.Option(help="Failure probability of each certificate.")] = 0.001,
    objective: Annotated[
        str, typer.Option(help="Training objective: gaussian, stability, consistency or dign.")
    ] = "gaussian",
    procedure: Annotated[
        str,
        typer.Option(help="fixed: n votes an image (Cohen et al.); anytime: stop as soon as the answer is known."),
    ] = "fixed",
    target: Annotated[
        str, typer.Option(help="selected: the class chosen on n0 votes; label: test the known label directly.")
    ] = "selected",
    noise: Annotated[
        str, typer.Option(help="grid: rounded to the pixel grid, sound in floating point; float: as published numbers.")
    ] = "grid",
    seed: Annotated[str, typer.Option(help="Seed of training and noise; several with commas.")] = "0",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="[defense.]key=value; several values: a run for each. Repeatable.")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="[defense.]key=value,value: train with each, keep the most accurate under noise on the "
            "validation split. Repeatable."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    out: Out = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train (or load) defenses and certify them; typed again, resumes what is unfinished."""
    from bench.console import ConsoleReporter
    from bench.environment import pick_device
    from bench.plan import make_plans
    from bench.run import Session

    plans = make_plans(
        defenses=defense,
        dataset=dataset,
        sigma=sigma,
        train_sigma=train_sigma,
        base=base,
        weights=weights,
        preset=preset,
        examples=examples,
        n0=n0,
        n=n,
        alpha=alpha,
        objective=objective,
        procedure=procedure,
        target=target,
        noise=noise,
        seed=seed,
        settings=set_ or [],
        search=search or [],
    )
    session = Session(pick_device(device), out, ConsoleReporter())
    if dry_run:
        _print_dry_run([session.estimate(plan) for plan in plans], as_json)
        return
    try:
        records = [session.run(plan) for plan in plans]
    except KeyboardInterrupt:  # caught here, since typer would turn it into a silent exit
        raise Interrupted("interrupted; all that is certified is kept: type the same command again to resume") from None
    if as_json:
        print(json.dumps([{"path": str(r.path), **r.info} for r in records], indent=1))
        return
    from bench import report

    print(report.render(records, "md"))
    print(f"runs in {out}; bench report {out} makes the report")


def _print_dry_run(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from bench.run import duration

    for row in rows:
        print(
            f"{row['run']}: {row['images']} images, {row['votes']:,} votes, certify about {duration(row['seconds'])}, "
            f"train about {duration(row['train_seconds'])}"
        )
    total = sum(r["seconds"] + r["train_seconds"] for r in rows)
    print(
        f"in all {sum(r['votes'] for r in rows):,} votes, about {duration(total)}, "
        "the training of bases and shared parts not counted"
    )


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="defenses, datasets, bases or runs.")] = "defenses",
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List what there is to run, and what was run."""
    from bench import listing

    rows = listing.rows(what, out)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(f"no {what}")
        return
    grid = Table(box=None, pad_edge=False)
    for column in rows[0]:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(str(v) for v in row.values()))
    Console(markup=False, highlight=False).print(grid)


@app.command("report")
def report_(
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    format: Annotated[str, typer.Option(help="md, latex, csv, json or html.")] = "md",
    out: Annotated[
        Path | None, typer.Option(help="Folder, or file ending in the format; default: print (html has none).")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show what others published, below each table, and what differs.")
    ] = False,
) -> None:
    """Make the table, and with --out the figures or the page, of all finished runs. Exit 1 when some were left out."""
    from bench import report, tables
    from bench.errors import unknown

    if format not in (known := ("md", "latex", "csv", "json", "html")):
        raise unknown("format", format, known)
    if published and format not in ("md", "latex"):
        raise BenchError(f"--published: goes with --format md or latex, not {format}")
    if format == "html" and out is None:
        raise BenchError(
            "a page is 5 MB and not for a terminal; say where to write it: --format html --out report.html"
        )
    records, left_out = tables.load_records(runs)
    for line in left_out:
        print(f"bench: left out: {line}", file=sys.stderr)
    if not records:
        raise BenchError(f"no finished run in {runs}; bench run makes one")
    if format != "html":
        print(report.render(records, format, published), end="")
    if out is not None:
        for file in report.write(records, format, out, published, left_out):
            print(f"wrote {file}", file=sys.stderr)
    if left_out:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")],
    as_json: AsJson = False,
) -> None:
    """Test which of several runs on the same images is better, at every radius. Exit 3: not comparable."""
    from bench import compare

    found = compare.compare(runs)
    print(json.dumps(found, indent=1) if as_json else compare.markdown(found), end="\n" if as_json else "")


@app.command()
def check(
    baseline: Annotated[Path, typer.Option(help="The file to hold the runs against; --update makes it.")],
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    update: Annotated[bool, typer.Option("--update", help="Make these runs the baseline; say what changed.")] = False,
    any_base: Annotated[
        bool | None,
        typer.Option(
            "--any-base/--same-base",
            help="With --update: whether the base may have other weights, as one trained anew on another machine has. "
            "Default: as the file says, at first not.",
        ),
    ] = None,
    points: Annotated[float, typer.Option(help="The least loss of certified accuracy that fails, in points.")] = 2.0,
    factor: Annotated[float, typer.Option(help="Warn of votes that take this many times as long.")] = 1.5,
    as_json: AsJson = False,
) -> None:
    """Hold runs against a baseline. Exit 1: one regresses or is not reproduced; 3: one is missing or not comparable."""
    from bench import check, github
    from bench.baseline import update as written

    if update:
        lines = check.changes(*written(baseline, runs, any_base))
        print(json.dumps(lines, indent=1) if as_json else "\n".join([*lines, f"wrote {baseline}"]))
        return
    if any_base is not None:
        raise BenchError("--any-base and --same-base are a baseline's own statement; give them with --update")
    found = check.check(baseline, runs, points, factor)
    text = check.markdown(found)
    print(json.dumps(found, indent=1) if as_json else text, end="\n" if as_json else "")
    github.publish(text, check.findings(found))
    verdicts = {one["verdict"] for one in found["entries"]}
    if check.REGRESSES in verdicts:
        raise typer.Exit(1)
    if check.NOT_COMPARABLE in verdicts:
        raise NotComparable(check.headline(found))


@app.command("import")
def import_(
    log: Annotated[Path, typer.Argument(help="A released log: one line an image, tab-separated, with a header.")],
    dataset: Annotated[str, typer.Option(help="A card's name, ./card.toml, or the name of any other data set.")],
    sigma: Annotated[float, typer.Option(help="Noise of the certificates, in pixels of [0, 1].")],
    alpha: Annotated[float, typer.Option(help="Failure probability of each certificate.")],
    n: Annotated[int, typer.Option("--n", help="Votes that bound the probability; of adaptive sampling the most.")],
    n0: Annotated[int | None, typer.Option("--n0", help="Votes that select the class; default: not stated.")] = None,
    format: Annotated[str, typer.Option(help="cohen: n votes an image; adaptive: their number varies.")] = "cohen",
    radius: Annotated[
        float | None, typer.Option(help="The radius tested, where an adaptive log says only whether it was proved.")
    ] = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Make a run folder of a released log. Exit 1 when something is wrong with the log; it is imported all the same."""
    from bench import importing, report
    from bench.flaws import Stated

    stated = Stated(format, dataset, sigma, alpha, n, n0, radius)
    record = importing.import_log(log, stated, out)
    if as_json:
        print(json.dumps({"path": str(record.path), **record.info}, indent=1))
    else:
        print(report.render([record], "md"))
        print(f"imported as {record.path}")
    if record.flags:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: print.")] = None,
) -> None:
    """Write a run as the common tab-separated log: idx, label, predict, radius, correct, time."""
    from bench.logs import export_log
    from bench.store import read_run

    text = export_log(read_run(run))
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text)
    except OSError as e:
        raise BenchError(f"cannot write {out}: {e.strerror}; choose another file with --out") from None
    print(f"wrote {out}", file=sys.stderr)


@app.command()
def doctor(
    defense: Annotated[str, typer.Argument(help="A defense's name or ./file.py.")],
    dataset: Annotated[str, typer.Option(help="The card whose images and base it is tried on.")] = "digits",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a defense keeps its side of the interface, and say what to mend. Exit 1 when something is wrong."""
    from bench.doctor import examine
    from bench.plan import make_plans

    (plan,) = make_plans(defenses=defense, dataset=dataset, settings=set_ or [])
    _print_findings(list(examine(plan)), as_json)
    if not as_json:
        print(f"{defense} may be run: bench run --defense {defense} --dataset {dataset}")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    deep: Annotated[bool, typer.Option("--deep", help="Certify every image again; train anew where needed.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Audit a record: radii from counts, images, hashes, a sample drawn again. Exit 1 when something is wrong."""
    from bench.store import read_run
    from bench.verify import check_record, draw_again

    findings = list(check_record(run))
    if not any(f.problem for f in findings):
        from bench.console import ConsoleReporter
        from bench.environment import pick_device
        from bench.run import Session

        session = Session(pick_device(device), run.parent, ConsoleReporter())
        findings.append(draw_again(read_run(run), session, deep))
    _print_findings(findings, as_json)


def _print_findings(findings: list[Any], as_json: bool) -> None:
    """Each check on its line, what is wrong below it; exit 1 when anything is."""
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=1))
    else:
        for f in findings:
            print(f"wrong: {f.check}\n       {f.problem}" if f.problem else f"ok:    {f.check}")
    if any(f.problem for f in findings):
        raise typer.Exit(1)
