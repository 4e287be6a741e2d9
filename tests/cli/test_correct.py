"""--target correct: certificates as of --target selected, without the votes of images whose selected class is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records.record import read_run
from bench.runs.model_card import model_card
from tests.helpers.commands import TINY, Result
from tests.helpers.records import made_up

Bench = Callable[..., Result]
ARGS = ("run", "--defense", "none", "--dataset", TINY, "--examples", "60", "--n", "400", "--sigma", ".25")
KINDS = ("fixed", "anytime")
Runs = dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of each procedure with each of the two targets, and their run folders."""
    from bench.cli import main

    found = {}
    for kind in KINDS:
        for target in ("selected", "correct"):
            out = tmp_path_factory.mktemp(f"{kind}-{target}")
            with pytest.raises(SystemExit) as stop:
                main([*ARGS, "--procedure", kind, "--target", target, "--out", str(out)])
            assert not stop.value.code
            (found[kind, target],) = out.iterdir()
    return found


def lines(run: Path) -> dict[int, dict[str, Any]]:
    """The certificates by image, without their seconds."""
    found = [json.loads(line) for line in (run / "certificates.jsonl").read_text().splitlines()]
    return {c["index"]: {k: v for k, v in c.items() if k != "seconds"} for c in found}


def info(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_right_images_have_the_certificates_of_target_selected(runs: Runs, kind: str) -> None:
    selected, correct = lines(runs[kind, "selected"]), lines(runs[kind, "correct"])
    stopped = {i for i, c in correct.items() if c["n"] == 0}
    for index, c in correct.items():
        if index not in stopped:
            assert c == selected[index] and c["predicted"] in (None, c["label"])
            continue
        assert c["predicted"] not in (None, c["label"]) and selected[index]["predicted"] in (None, c["predicted"])
        bare = {"radius": 0, "p_lower": 0, "top_count": 0, "runner_up": None, "runner_up_count": 0}
        assert {k: c[k] for k in bare} == bare and (c["n0"], c["votes"]) == (20, 20)
    # Wrong, right and abstained images are all there, and some of those that stopped abstain with more votes.
    assert 5 < len(stopped) < 55 and {c["predicted"] for i, c in correct.items() if i not in stopped} > {None}
    assert any(selected[i]["predicted"] is None for i in stopped)
    one, other = info(runs[kind, "selected"]), info(runs[kind, "correct"])
    for key in ("certified_accuracy", "acr", "images"):
        assert one["metrics"][key] == other["metrics"][key]
    spared = sum(selected[i]["votes"] - 20 for i in stopped)
    assert other["cost"]["votes"] == one["cost"]["votes"] - spared


@pytest.mark.parametrize("kind", KINDS)
def test_its_records_are_verified_and_drawn_again(bench: Bench, runs: Runs, kind: str) -> None:
    result = bench("verify", runs[kind, "correct"], "--deep", "--fresh")
    assert result.code == 0, result.out
    assert "60 images drawn again from the seed give the recorded counts, exactly" in result.out
    certified = sum(c["predicted"] is not None and c["n"] > 0 for c in lines(runs[kind, "correct"]).values())
    assert f"fresh noise: {certified} images" in result.out


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_pages_say_what_is_not_known(bench: Bench, runs: Runs, kind: str, tmp_path: Path) -> None:
    run = runs[kind, "correct"]
    said = bench("report", run).out
    assert "n0 20, target correct, " in said.splitlines()[0]
    assert "Target correct: an image whose selected class is wrong cannot count as certified" in said
    (table,) = json.loads(bench("report", run, "--format", "json").out)["tables"]
    assert [row["abstained"] for row in table["rows"]] == [None]
    assert bench("report", run, "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "How often the model abstains is not known" in page and "known label" not in page
    outcomes = re.findall(r"none: ([^<]*)</li>", page)
    assert any(re.fullmatch(r"wrong \(\d\), no radius", o) for o in outcomes)
    # From the largest radius over abstentions to errors, as the gallery says.
    order = ["abstained".startswith(o) + 2 * o.startswith("wrong") for o in outcomes]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    assert "Target correct" not in bench("report", runs[kind, "selected"]).out


def test_no_table_or_comparison_holds_runs_of_both_targets(bench: Bench, runs: Runs, tmp_path: Path) -> None:
    for (kind, target), run in runs.items():
        (tmp_path / f"{kind}-{target}").symlink_to(run)
    tables = json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]
    assert [len(t["rows"]) for t in tables] == [1] * 4
    refused = bench("compare", runs["fixed", "selected"], runs["fixed", "correct"])
    assert refused.code == 3 and "procedure.target is selected and correct" in refused.err


def test_comparisons_name_predictions_without_a_radius(bench: Bench, tmp_path: Path) -> None:
    procedure = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "correct"}
    paths = [made_up(tmp_path / n, [0.3, 0.2], w, procedure=procedure, name=n) for n, w in (("a", []), ("b", [0]))]
    said = bench("compare", *paths)
    assert said.code == 0 and "target correct" in said.out.splitlines()[0]
    assert "| 0 within 0.3" in said.out and "| 1, no radius " in said.out
    (pair,) = json.loads(bench("compare", *paths, "--json").out)["pairs"]
    (lead,) = pair["first_ahead"]
    assert lead["behind"] == {"predicted": 1, "radius": None} and lead["ahead"]["predicted"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_of_it_is_imported_without_a_flag(bench: Bench, runs: Runs, kind: str, tmp_path: Path) -> None:
    log, run = tmp_path / "log.tsv", runs[kind, "correct"]
    assert bench("export", run, "--out", log).code == 0
    ran = bench("import", log, "--dataset", TINY, "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.out
    imported = json.loads(ran.out)
    assert imported["identity"]["procedure"]["target"] == "correct"
    assert imported["metrics"] == info(run)["metrics"] and imported["cost"]["votes"] == info(run)["cost"]["votes"]
    assert bench("verify", imported["path"]).code == 0
    shown = bench("report", imported["path"]).out
    assert "target correct" in shown and "'abstained' is unknown" in shown
    # A wrong prediction with a radius is a defect.
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    wrong = next(row for row in rows[1:] if row[2] not in ("-1", row[1]))
    wrong[3] = "0.25"
    log.write_text("".join("\t".join(row) + "\n" for row in rows))
    flagged = bench("import", log, "--dataset", TINY, "--out", tmp_path / "others", "--json")
    (flag,) = json.loads(flagged.out)["flags"]
    assert flagged.code == 1 and f"taken as 0: 1 of the rows, image {wrong[0]} first" in flag
    assert json.loads(flagged.out)["metrics"] == info(run)["metrics"]


def test_bench_check_takes_it_and_does_not_judge_its_votes(bench: Bench, runs: Runs, tmp_path: Path) -> None:
    file, run = tmp_path / "baseline.json", runs["fixed", "correct"]
    assert bench("check", run, "--baseline", file, "--update").code == 0
    result = bench("check", run, "--baseline", file)
    assert result.code == 0, result.out
    assert "counts are equal on every image" in result.out


def test_more_votes_of_other_weights_are_no_regression(bench: Bench, tmp_path: Path) -> None:
    """A defense that gets more images right draws more votes."""
    procedure = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "correct"}
    baseline = tmp_path / "baseline.json"
    before = made_up(tmp_path / "before", [0.3] * 20, range(10), procedure=procedure)
    assert bench("check", before, "--baseline", baseline, "--update").code == 0
    weights = {"weights": "f" * 64, "name": "lora", "source": "d" * 64, "config": {"rank": 4}, "parts": {}}
    now = made_up(tmp_path / "now", [0.3] * 20, procedure=procedure, defense={**weights, "objective": "gaussian"})
    result = bench("check", now, "--baseline", baseline)
    assert result.code == 0, result.out
    assert "votes: 22,000, was 12,000: not judged" in result.out


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_resumed_runs_are_the_same_run(bench: Bench, runs: Runs, kind: str, tmp_path: Path) -> None:
    args = (*ARGS, "--procedure", kind, "--target", "correct", "--out", tmp_path)
    for shard in ("1/2", "2/2"):
        assert bench(*args, "--shard", shard).code == 0
    assert bench("merge", tmp_path).code == 0
    (merged,) = tmp_path.iterdir()
    assert lines(merged) == lines(runs[kind, "correct"])
    assert info(merged)["metrics"] == info(runs[kind, "correct"])["metrics"]
    stated = info(merged)
    for key in ("certificates_sha256", "cost", "metrics", "shards"):
        del stated[key]
    (merged / "run.json").write_text(json.dumps(stated | {"status": "started"}))
    half = (merged / "certificates.jsonl").read_text().splitlines(keepends=True)[:30]
    (merged / "certificates.jsonl").write_text("".join(half))
    assert bench(*args).code == 0
    assert lines(merged) == lines(runs[kind, "correct"])
    (row,) = json.loads(bench("status", merged, "--json").out)
    right = sum(c["predicted"] == c["label"] for c in lines(merged).values())
    assert row["state"] == "complete" and math.isclose(row["accuracy"], right / 60)


def test_a_model_card_states_abstentions_only_where_they_are_known(tmp_path: Path) -> None:
    for target in ("selected", "label", "correct"):
        procedure = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": target}
        card = model_card(read_run(made_up(tmp_path / target, [0.3, None], procedure=procedure)), "timm", [])
        assert ("; 50.0% abstained" in card) == (target == "selected")
