"""The command ``bench``. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import errno
import importlib.util
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.cli.options import AsJson, Out, print_findings, print_table
from bench.cli.records import app as records_app
from bench.errors import BenchError, DefenseFault, Interrupted, NotComparable, note, shown, unknown
from bench.process import watchdog

app = typer.Typer(
    help="Compare certified defenses through one certification engine.",
    add_completion=False,
    rich_markup_mode=None,  # it takes [ray] for a colour and leaves it out
    pretty_exceptions_enable=False,
)


def main(args: list[str] | None = None) -> None:
    """Entry point: errors a user can mend are one line; exit codes as in the README."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names in records may be no text that a terminal can take
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
        _fail(f"cannot write {e.filename or 'a file'}: {e.strerror}; free space, and type the same command again", 2)
    except Exception as e:
        if hasattr(e, "format_message"):  # click's usage errors
            _fail(e.format_message() + hint(typed, e.format_message()), 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


LISTS = ("--defense", "--sigma", "--seed", "--arithmetic")  # options of which one value has commas in it
REPEATED = ("--set", "--search")


def hint(typed: Sequence[str], problem: str) -> str:
    """How to give an option several values, where the problem is that blanks stand between them."""
    if "unexpected extra argument" not in problem:
        return ""
    for start, option in enumerate(typed):
        name, equals, value = option.partition("=")
        after = itertools.takewhile(lambda word: not word.startswith("--"), typed[start + 1 :])
        values = [*([value] if equals else []), *after]
        if len(values) > 1 and name in LISTS:
            return f"; several values go with commas between: {name} {','.join(v.strip(',') for v in values)}"
        if len(values) > 1 and name in REPEATED:
            return f"; give the option again for each: {' '.join(f'{name} {v}' for v in values)}"
    return ""


def _fail(message: str, code: int) -> None:
    print(f"bench: {shown(message)}", file=sys.stderr)
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
    split: Annotated[
        str, typer.Option(help="test; or validation, to choose sigma by: never in one table with test.")
    ] = "test",
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
    arithmetic: Annotated[
        str,
        typer.Option(
            help="How logits are computed when certifying: float32, or bfloat16, channels-last, compile, several "
            "with commas. Each makes another classifier, named in tables."
        ),
    ] = "float32",
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
    shard: Annotated[
        str | None, typer.Option(help="i/k: certify the i-th of k shares of the images; bench merge joins them.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a block of votes or a training step may take; 0: no limit.")
    ] = 1800.0,
    out: Out = Path("runs"),
    executor: Annotated[
        str, typer.Option(help="local: in this process, on all visible GPUs; ray: on a Ray cluster (certbench[ray]).")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray cluster; default: the one running here, else one for the command.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate votes and time, then exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train (or load) defenses and certify them; typed again, resumes what is unfinished."""
    from bench.options import RunOptions
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device, same_kind
    from bench.records.shards import Shard
    from bench.records.writer import check_writable
    from bench.runs.plan import check_effects, make_plans
    from bench.runs.session import Session

    part = Shard.parse(shard) if shard else None
    on_ray = _on_ray(executor, ray_address) and not dry_run
    if on_ray and part:
        raise BenchError("--shard and --executor ray are two ways to share the work: leave one out")
    plans = make_plans(
        RunOptions(
            defenses=defense,
            dataset=dataset,
            sigma=sigma,
            train_sigma=train_sigma,
            base=base,
            weights=None if weights is None else str(weights),
            preset=preset,
            split=split,
            examples=examples,
            n0=n0,
            n=n,
            alpha=alpha,
            objective=objective,
            procedure=procedure,
            target=target,
            noise=noise,
            arithmetic=arithmetic,
            seed=seed,
            settings=tuple(set_ or ()),
            search=tuple(search or ()),
        )
    )
    check_effects(plans)
    reporter = ConsoleReporter()
    if not on_ray:
        here = pick_device(device)
        session = Session(here, out, reporter, part, same_kind(here))
    if dry_run:
        _print_dry_run([session.estimate(plan) for plan in plans], as_json)
        return
    check_writable(out)
    records, faults = [], []
    try:
        with watchdog.limit(timeout):
            if on_ray:
                from bench.cluster.executor import run as run_on_ray

                outcomes = run_on_ray(plans, out, reporter, device, ray_address, timeout)
            else:
                outcomes = session.runs(plans)
            for outcome in outcomes:
                if not isinstance(outcome, DefenseFault):
                    records.append(outcome)
                    continue
                faults.append(str(outcome))
                if len(plans) > 1:
                    note(f"run {len(records) + len(faults)} of {len(plans)} failed, the others go on: {outcome}")
    except KeyboardInterrupt:  # caught here, since typer would turn it into a silent exit
        raise Interrupted("interrupted; all that is certified is kept: type the same command again to resume") from None
    if as_json:
        print(json.dumps([{"path": str(r.path), **r.info.as_json()} for r in records], indent=1))
    elif part:
        for r in records:
            print(f"{r.path}: complete, {len(r.certificates)} images")
        print(f"bench merge {out} joins the {part.of} shards when all are complete")
    elif records:
        from bench.report import build

        print(build.render(records, "md"))
        print(f"runs in {out}; bench report {out} makes the report")
    if faults:
        raise BenchError(f"{len(faults)} of {len(plans)} runs failed: {'; '.join(faults)}" if records else faults[0])


def _on_ray(executor: str, address: str | None) -> bool:
    """Whether ``--executor`` is ray. Raises BenchError where it is unknown, or Ray is missing or not asked for."""
    if executor not in ("local", "ray"):
        raise unknown("--executor", executor, ("local", "ray"))
    if executor == "local":
        if address is not None:
            raise BenchError(f"--ray-address {address}: give --executor ray too")
        return False
    if importlib.util.find_spec("ray") is None:
        raise BenchError("--executor ray: Ray is not installed; pip install 'certbench[ray]'")
    return True


def _print_dry_run(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from bench.process.console import duration

    for row in rows:
        print(
            f"{row['label']}: {row['images']} images, {row['votes']:,} votes{_of(row['flops_per_vote'])}, "
            f"certify about {duration(row['seconds'])}, train about {duration(row['train_seconds'])}"
        )
    if fewer := [row for row in rows if row["timed_rows"] < row["block"]]:
        part = " or ".join(dict.fromkeys(f"{r['timed_rows']} of {r['block']}" for r in fewer))
        print(
            f"timed on {part} rows of a block in {len(fewer)} of {len(rows)} runs, since a whole block takes long here"
        )
    total = sum(r["seconds"] + r["train_seconds"] for r in rows)
    print(
        f"in all {sum(r['votes'] for r in rows):,} votes, about {duration(total)}, "
        "the training of bases and shared parts not counted"
    )


def _of(flops: float | None) -> str:
    return "" if flops is None else f" of {flops / 1e9:.3g} GFLOPs"


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="defenses, datasets, bases or runs.")] = "defenses",
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List what there is to run, and what was run."""
    from bench.cli import listing

    rows = listing.rows(what, out)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print_table(rows, f"no {what}")


@app.command()
def doctor(
    defense: Annotated[str, typer.Argument(help="A defense's name or ./file.py.")],
    dataset: Annotated[str, typer.Option(help="The card whose images and base it is tried on.")] = "digits",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a defense keeps its side of the interface, and say what to mend. Exit 1 when something is wrong."""
    from bench.options import RunOptions
    from bench.runs.doctor import examine
    from bench.runs.plan import make_plans

    (plan,) = make_plans(RunOptions(defenses=defense, dataset=dataset, settings=tuple(set_ or ())))
    print_findings(list(examine(plan)), as_json)
    if not as_json:
        print(f"{defense} may be run: bench run --defense {defense} --dataset {dataset}")


app.add_typer(records_app)
