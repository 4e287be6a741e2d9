"""Options of ``bench run`` and its command line are one thing: each gives the other."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import typer
from hypothesis import given
from hypothesis import strategies as st

from bench.cli.options import Execution, with_options
from bench.options import RunOptions, flag
from tests.helpers.commands import Bench

WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=8).filter(lambda w: w[:1] != "-")
VALUES = {
    "str": WORDS,
    "str | None": st.none() | WORDS,
    "int | None": st.none() | st.integers(-5, 10**9),
    "float": st.floats(allow_nan=False),
    "float | None": st.none() | st.floats(allow_nan=False),
    "tuple[str, ...]": st.lists(WORDS, max_size=3).map(tuple),
}
OPTIONS = st.builds(RunOptions, **{f.name: VALUES[str(f.type)] for f in fields(RunOptions)})


def parsed(words: list[str]) -> tuple[RunOptions, Execution]:
    """The objects that a command of both gets."""
    found: list[tuple[RunOptions, Execution]] = []
    app = typer.Typer()

    @app.command()
    @with_options(RunOptions, Execution)
    def command(options: RunOptions, execution: Execution) -> None:
        """Keep both."""
        found.append((options, execution))

    app(args=words, standalone_mode=False)
    return found[0]


@given(OPTIONS)
def test_the_command_of_options_gives_the_options_again(options: RunOptions) -> None:
    bench, run, *words = shlex.split(options.command())
    assert (bench, run) == ("bench", "run")
    assert parsed(words)[0] == options
    assert RunOptions.of(options.record()) == options


def test_defaults_are_those_of_the_dataclasses() -> None:
    options, execution = parsed(["--defense", "none", "--dataset", "d"])
    assert options == RunOptions(defenses="none", dataset="d")
    assert execution == Execution()


def test_execution_is_read_from_the_command_line() -> None:
    words = "--defense none --dataset d --out there --dry-run --json --timeout 5 --shard 1/2 --ray-address a:1"
    _, execution = parsed(words.split())
    assert execution == Execution(
        out=Path("there"), dry_run=True, as_json=True, timeout=5.0, shard="1/2", ray_address="a:1"
    )


def test_help_shows_every_option_with_its_text(bench: Bench) -> None:
    text = " ".join(bench("run", "--help").out.split())
    for one in (*fields(RunOptions), *fields(Execution)):
        assert f"{flag(one)} " in text
        assert one.metadata["help"] in text.replace("- ", "-")


def test_usage_errors_are_one_line(bench: Bench) -> None:
    for words, problem in (
        (("--dataset", "d"), "--defense"),
        (("--defense", "none", "--dataset", "d", "--timeout", "-1"), "greater than or equal to 0"),
        (("--defense", "none", "--dataset", "d", "--n", "many"), "--n"),
        (("--defense", "none", "--dataset", "d", "--no-dry-run"), "--no-dry-run"),
    ):
        result = bench("run", *words)
        assert result.code == 2 and result.err.count("\n") == 1 and problem in result.err
