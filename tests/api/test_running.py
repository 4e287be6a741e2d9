"""bench.run: options as a person types them, records as the command writes them, errors that name the option."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import bench
from bench.api.running import Options, options_of
from bench.options import RunOptions
from tests.helpers.commands import TINY, Bench, defense


def test_importing_bench_loads_neither_torch_nor_pandas_nor_matplotlib() -> None:
    code = (
        "import sys, bench; bench.run, bench.load, bench.Results, bench.BenchError; "
        "heavy = {'torch', 'pandas', 'matplotlib', 'numpy', 'scipy', 'pydantic', 'rich', 'typer'}; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_typed_options_are_those_of_the_command() -> None:
    required = {"defenses", "dataset", "sigma"}
    assert set(get_type_hints(Options)) == {one.name for one in fields(RunOptions)} - required


def test_values_are_those_of_the_command_line() -> None:
    typed: dict[str, Any] = {
        "defense": ["none", Path("./mine.py")],
        "dataset": Path("cards/card.toml"),
        "sigma": [0.25, np.float32(0.5)],
        "seed": [0, np.int64(1)],
        "n": np.int64(100),
        "alpha": 1e-3,
        "train_sigma": 1,
        "examples": 20,
        "radii": np.array([0.1, 0.2]),
        "base": None,
        "weights": Path("w.safetensors"),
        "settings": {"lora.rank": [4, 8], "head": True},
        "search": "lr=0.1,0.2",
        "arithmetic": ["bfloat16", "compile"],
    }
    assert options_of(typed) == RunOptions(
        defenses="none,mine.py",
        dataset="cards/card.toml",
        sigma="0.25,0.5",
        seed="0,1",
        n=100,
        alpha=0.001,
        train_sigma=1.0,
        examples="20",
        radii="0.1,0.2",
        weights="w.safetensors",
        settings=("lora.rank=4,8", "head=true"),
        search=("lr=0.1,0.2",),
        arithmetic="bfloat16,compile",
    )
    assert options_of({"defense": "none", "dataset": "digits", "sigma": None}) == RunOptions(
        defenses="none", dataset="digits"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"sgima": 0.5}, "unknown option 'sgima'; did you mean sigma"),
        ({"defenses": "lora"}, "unknown option 'defenses'; did you mean defense?"),
        ({"sigma": -1}, "--sigma -1: must be a number above 0"),
        ({"n": "many"}, "n: 'many' is not a number"),
        ({"n": 10.5}, "n: Input should be a valid integer"),
        ({"split": ["test", "train"]}, "split: one value, not a list"),
        ({"settings": 3}, 'settings: give "key=value"'),
        ({"settings": {"rank": {}}}, "settings, rank: {} is neither text nor a number"),
        ({"sigma": None, "n": 2}, "--n 2: too few votes"),
        ({"procedure": "fast"}, "unknown --procedure 'fast'"),
        ({"device": "tpu"}, "--device tpu: not available"),
    ],
)
def test_a_wrong_option_is_one_error_before_any_work(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    run: Any = bench.run
    with pytest.raises(bench.BenchError) as error:
        run("lora", "digits", out=tmp_path, **options)
    assert problem in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_runs_are_those_of_the_command(bench_command: Bench, tmp_path: Path) -> None:
    records = bench.run(["none", "lora"], TINY, sigma=[0.25, 0.5], out=tmp_path, settings={"lora.rank": 4})
    assert [(r.identity.defense.name, r.identity.sigma) for r in records] == [
        ("none", 0.25), ("lora", 0.25), ("none", 0.5), ("lora", 0.5),
    ]  # fmt: skip
    assert all(r.complete for r in records)
    words = ("--defense", "none,lora", "--sigma", "0.25,0.5", "--set", "lora.rank=4")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("certificates.jsonl")}
    again = bench_command("run", "--dataset", TINY, *words, "--out", tmp_path)
    assert again.code == 0, again.err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("certificates.jsonl")} == files
    assert len(files) == 4


def test_a_faulty_defense_is_an_error_after_the_others_are_finished(tmp_path: Path) -> None:
    with pytest.raises(bench.BenchError, match=r"1 of 2 runs failed: defense .*raises"):
        bench.run([defense("raises"), "none"], TINY, out=tmp_path)
    assert len(bench.load(tmp_path)) == 1
    with pytest.raises(bench.BenchError, match="raises"):
        bench.run(defense("raises"), TINY, out=tmp_path)
