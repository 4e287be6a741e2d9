"""--radii: the radii of a run's table, which are those that the anytime procedure certifies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
ARGS = ("run", "--defense", defense("half_space"), "--dataset", TINY, "--examples", 10, "--n", 1000)
ANYTIME = ("--procedure", "anytime")


def run(bench: Bench, out: Path, *extra: object) -> tuple[Path, dict[str, Any]]:
    ran = bench(*ARGS, "--out", out, "--json", *extra)
    assert ran.code == 0, ran.err
    (found,) = json.loads(ran.out)
    return Path(found["path"]), json.loads((Path(found["path"]) / "run.json").read_text())


def columns(bench: Bench, *paths: Path) -> list[list[str]]:
    """The radii of each table of a report."""
    tables = json.loads(bench("report", *paths, "--format", "json").out)["tables"]
    return [
        [k.removeprefix("certified_") for k in t["rows"][0] if k.startswith("certified_") and k.count("_") == 1]
        for t in tables
    ]


def test_an_anytime_run_certifies_at_the_radii_given(bench: Bench, tmp_path: Path) -> None:
    path, info = run(bench, tmp_path, *ANYTIME, "--radii", ".3,.1")
    assert info["identity"]["procedure"]["radii"] == [0.1, 0.3] and info["radii"] == [0, 0.1, 0.3]
    assert info["arguments"]["radii"] == ".3,.1"
    certified = [json.loads(line)["radius"] for line in (path / "certificates.jsonl").read_text().splitlines()]
    assert 0.3 in certified and set(certified) <= {0, 0.1, 0.3}
    assert [m["radius"] for m in info["metrics"]["certified_accuracy"]] == [0, 0.1, 0.3]
    verified = bench("verify", path, "--defense", defense("half_space"))
    assert verified.code == 0 and "recorded counts, exactly" in verified.out
    said = bench(*ARGS, "--out", tmp_path, *ANYTIME, "--radii", "0,.1,.3,.3")
    assert "already complete, nothing to do" in said.err and "now has the radii" not in said.err
    assert "| r = 0.1 " in said.out and "r = 0.25" not in said.out
    run(bench, tmp_path, *ANYTIME)
    run(bench, tmp_path, *ANYTIME, "--radii", ".1")
    assert sorted(columns(bench, tmp_path)) == [["0", "0.1"], ["0", "0.1", "0.3"], ["0", "0.25", "0.5"]]
    refused = bench("compare", *tmp_path.iterdir())
    assert refused.code == 3 and "procedure.radii" in refused.err


def test_a_fixed_run_gets_another_table_and_keeps_its_certificates(bench: Bench, tmp_path: Path) -> None:
    path, before = run(bench, tmp_path)
    lines = (path / "certificates.jsonl").read_bytes()
    said = bench(*ARGS, "--out", tmp_path, "--radii", ".1,.2")
    assert f"{path}: its table now has the radii 0, 0.1, 0.2" in said.err and "already complete" in said.err
    assert "| r = 0.2 " in said.out and "r = 0.25" not in said.out
    now = json.loads((path / "run.json").read_text())
    assert [m["radius"] for m in now["metrics"]["certified_accuracy"]] == now["radii"] == [0, 0.1, 0.2]
    changed = {k for k in now if now[k] != before[k]}
    assert changed == {"radii", "metrics", "arguments"} and now["arguments"]["radii"] == ".1,.2"
    assert (path / "certificates.jsonl").read_bytes() == lines and len(list(tmp_path.iterdir())) == 1
    assert bench("verify", path, "--defense", defense("half_space")).code == 0
    # A command that asks for no radii changes none.
    assert run(bench, tmp_path)[1] == now and columns(bench, tmp_path) == [["0", "0.1", "0.2"]]


def test_an_interrupted_run_has_the_radii_asked_for_last(bench: Bench, tmp_path: Path) -> None:
    path, whole = run(bench, tmp_path, "--radii", ".1")
    lines = (path / "certificates.jsonl").read_text().splitlines(keepends=True)
    started = {k: v for k, v in whole.items() if k not in ("certificates_sha256", "cost", "metrics")}
    for extra, radii in (((), [0, 0.1]), (("--radii", ".2"), [0, 0.2])):
        (path / "run.json").write_text(json.dumps(started | {"status": "started"}))
        (path / "certificates.jsonl").write_text("".join(lines[:4]))
        _, info = run(bench, tmp_path, *extra)
        assert [m["radius"] for m in info["metrics"]["certified_accuracy"]] == info["radii"] == radii
        assert bench("verify", path, "--defense", defense("half_space")).code == 0


def test_a_table_has_the_radii_of_all_its_runs(bench: Bench, tmp_path: Path) -> None:
    paths = [
        run(bench, tmp_path / "runs", "--set", f"threshold={t}", "--radii", r)[0]
        for t, r in ((".3", ".1,.3"), (".31", ".2"))
    ]
    run(bench, tmp_path / "runs", "--set", "threshold=.31", "--radii", ".25", "--seed", 1)
    assert columns(bench, tmp_path / "runs") == [["0", "0.1", "0.2", "0.25", "0.3"]]
    for format in ("md", "latex", "csv", "html"):
        assert bench("report", tmp_path / "runs", "--format", format, "--out", tmp_path / format).code == 0
    (pair,) = json.loads(bench("compare", *paths, "--json").out)["pairs"]
    assert [t["radius"] for t in pair["radii"]] == [0, 0.1, 0.2, 0.3]
    # The numbers at a radius are those of the certificates, whether or not a run named the radius.
    for path, key in zip(paths, ("certified_first", "certified_second"), strict=True):
        rows = [json.loads(line) for line in (path / "certificates.jsonl").read_text().splitlines()]
        for test in pair["radii"]:
            right = sum(c["predicted"] == c["label"] and c["radius"] >= test["radius"] for c in rows)
            assert test[key] == right / len(rows)


def test_a_best_sigma_curve_has_the_radii_of_all_its_runs(bench: Bench, tmp_path: Path) -> None:
    for split in ("test", "validation"):
        for sigma, radii in ((".25", ".1"), (".5", ".2")):
            run(bench, tmp_path, "--split", split, "--sigma", sigma, "--radii", radii)
    (envelope,) = json.loads(bench("report", tmp_path, "--format", "json").out)["envelopes"]
    assert [p["radius"] for p in envelope["rows"][0]["points"]] == [0, 0.1, 0.2]


def test_shards_of_several_tables_are_merged_into_one(bench: Bench, tmp_path: Path) -> None:
    for shard, radii in (("1/2", ".1"), ("2/2", ".3,.2")):
        assert bench(*ARGS, "--out", tmp_path, "--shard", shard, "--radii", radii).code == 0
    assert bench("merge", tmp_path).code == 0
    (path,) = tmp_path.iterdir()
    info = json.loads((path / "run.json").read_text())
    assert info["radii"] == [0, 0.1, 0.2, 0.3] and info["arguments"]["radii"] == "0.0,0.1,0.2,0.3"
    assert bench("verify", path, "--defense", defense("half_space")).code == 0
    again = bench(*ARGS, "--out", tmp_path, "--radii", info["arguments"]["radii"])
    assert "already complete" in again.err and "now has the radii" not in again.err


@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
def test_radii_beyond_reach_are_noted(bench: Bench, tmp_path: Path, procedure: str) -> None:
    args = (*ARGS, "--out", tmp_path, "--procedure", procedure, "--sigma", ".25,.5", "--dry-run", "--radii")
    said = bench(*args, ".5,2,3")
    assert said.code == 0 and "--radii 2, 3: a dash in tables" in said.err and "with 1,000 votes" in said.err
    assert "a dash in tables" not in bench(*args, "1").err  # within reach at sigma .5


@pytest.mark.parametrize(
    ("radii", "words"),
    [
        ("-.25", "radii are l2 distances, from 0 up"),
        (".25,nan,.5", "radii are l2 distances, from 0 up"),
        ("inf", "radii are l2 distances, from 0 up"),
        (".25;.5", "must be a number, or several with commas"),
        ("", "--radii is empty"),
        (".25,.2500000001", "two of them are printed alike"),
        (",".join(str(k / 100) for k in range(1, 101)), "at most 99 above 0"),
    ],
)
def test_invalid_radii_are_one_line(bench: Bench, tmp_path: Path, radii: str, words: str) -> None:
    result = bench(*ARGS, "--out", tmp_path, f"--radii={radii}")
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err
    assert not list(tmp_path.iterdir())


def test_blanks_between_radii_get_a_hint(bench: Bench) -> None:
    assert "--radii .25,.5" in bench(*ARGS, "--radii", ".25", ".5").err


def test_a_dry_run_shows_what_each_radius_costs(bench: Bench, tmp_path: Path) -> None:
    args = (*ARGS, "--out", tmp_path, "--dry-run", "--radii", ".25,.5,.75", "--n", 10_000)
    said = bench(*args, *ANYTIME, "--sigma", ".25,.5", "--seed", "0,1")
    assert said.out.count("votes of an image by its radius") == 2  # once a sigma
    rows = json.loads(bench(*args, *ANYTIME, "--json").out)
    (row,) = rows
    assert row["at_most"] and row["sigma"] == 0.25 and row["votes"] == 10 * 10_020
    assert [r["radius"] for r in row["radii"]] == [0, 0.25, 0.5, 0.75]
    assert [r["in_sigma"] for r in row["radii"]] == [0, 1, 2, 3]
    fewest = [r["fewest_votes"] for r in row["radii"]]
    shown = [line.split() for line in said.out.splitlines()]
    assert ["0.75", "3", f"{fewest[3]:,}"] in [words[:3] for words in shown]
    assert f"a sure image takes {fewest[3]:,} votes up to r = 0.75, but {fewest[2]:,} if the grid ends at 0.5" in (
        said.out
    )
    assert "at most 100,200 votes" in said.out
    # It does cost what the dry run says: the votes of a sure image of a real run.
    for radii, cost in ((".25,.5,.75", fewest[3]), (".25,.5", fewest[2])):
        path, _ = run(
            bench, tmp_path, *ANYTIME, "--radii", radii, "--n", 10_000, "--examples", 2, "--set", "threshold=-9"
        )
        assert {json.loads(line)["votes"] for line in (path / "certificates.jsonl").read_text().splitlines()} == {cost}
    fixed = bench(*args)
    assert "by its radius" not in fixed.out and "at most" not in fixed.out
    assert json.loads(bench(*args, "--json").out)[0]["radii"] is None
    assert "at most 10,200 votes" in bench(*ARGS, "--out", tmp_path, "--dry-run", "--target", "correct").out
