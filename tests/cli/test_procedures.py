"""--procedure, --target and --noise through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
ARGS = ("--defense", defense("half_space"), "--dataset", TINY, "--examples", 30, "--json")


def run(bench: Bench, out: Path, *extra: object) -> tuple[dict, list[dict]]:  # type: ignore[type-arg]
    ran = bench("run", *ARGS, "--out", out, *extra)
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    rows = [json.loads(line) for line in (Path(info["path"]) / "certificates.jsonl").read_text().splitlines()]
    return info, rows


def test_anytime_saves_votes_and_certifies_radii_of_the_grid(bench: Bench, tmp_path: Path) -> None:
    fixed, all_votes = run(bench, tmp_path, "--n", 4000)
    anytime, rows = run(bench, tmp_path, "--n", 4000, "--procedure", "anytime")
    assert anytime["cost"]["votes"] < 0.5 * fixed["cost"]["votes"]
    assert {r["radius"] for r in rows} <= {0.0, 0.25, 0.5}
    exact = {r["index"]: r for r in all_votes}
    for row in rows:
        assert row["n"] <= row["votes"] - row["n0"] <= 4000
        # The same votes decide: the fixed run looks at all of them, so it may only certify more.
        assert row["radius"] <= exact[row["index"]]["radius"]
    assert anytime["identity"]["procedure"]["radii"] == [0.25, 0.5]


def test_the_known_label_is_tested_directly(bench: Bench, tmp_path: Path) -> None:
    _, rows = run(bench, tmp_path, "--target", "label", "--procedure", "anytime", "--n", 2000)
    assert {r["n0"] for r in rows} == {0}
    assert all(r["predicted"] in (None, r["label"]) for r in rows)
    _, fixed = run(bench, tmp_path, "--target", "label")
    assert {r["votes"] for r in fixed} == {100}
    report = bench("report", tmp_path)
    assert report.code == 0
    assert report.out.count("known label") == 2
    for table in json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]:
        assert [r["abstained"] for r in table["rows"]] == [None]


def test_grid_noise_is_the_default_and_its_error_is_charged(bench: Bench, tmp_path: Path) -> None:
    grid, rows = run(bench, tmp_path)
    assert grid["identity"]["noise"]["kind"] == "grid"
    assert 0 < grid["identity"]["noise"]["tau"] < 1e-12
    assert grid["identity"]["noise"]["levels"] == 17
    floats, others = run(bench, tmp_path, "--noise", "float")
    assert floats["identity"]["noise"]["tau"] == 0
    assert [r["top_count"] for r in rows] != [r["top_count"] for r in others]


def test_runs_with_another_procedure_target_or_noise_share_no_table(bench: Bench, tmp_path: Path) -> None:
    for extra in ((), ("--noise", "float"), ("--target", "label"), ("--procedure", "anytime"), ("--seed", 1)):
        run(bench, tmp_path, *extra)
    tables = json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]
    assert sorted(len(t["rows"]) for t in tables) == [1, 1, 1, 2]  # only the seeds


def test_an_anytime_figure_is_drawn_at_the_grid(bench: Bench, tmp_path: Path) -> None:
    run(bench, tmp_path / "runs", "--procedure", "anytime", "--n", 1000)
    written = bench("report", tmp_path / "runs", "--out", tmp_path / "report")
    assert written.code == 0
    pictures = sorted((tmp_path / "report").glob("tiny-s0.25-*.png"))
    assert len(pictures) == 2 and pictures[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--procedure", "anytme"), "did you mean anytime"),
        (("--target", "labl"), "did you mean label"),
        (("--noise", "flot"), "did you mean float"),
        (("--procedure", "anytime", "--n", "9"), "the smallest is --n 10"),
    ],
)
def test_bad_values(bench: Bench, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    result = bench("run", *ARGS, "--out", tmp_path, *args)
    assert result.code == 2
    assert words in result.err
