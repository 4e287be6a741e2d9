"""bench compare: exact tests on the same images, and a refusal of everything else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from bench.records import paired
from bench.records.record import read_run
from bench.smoothing.anytime import Anytime
from bench.smoothing.procedures import describe
from tests.helpers.commands import TINY, Result
from tests.helpers.records import made_up, seal

Bench = Callable[..., Result]
COUNTS = st.integers(0, 200)
FIXED = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "selected"}


def test_numbers_of_a_made_up_pair(bench: Bench, tmp_path: Path) -> None:
    """Twenty images; the second run certifies eight more at .25 and loses one: p = 2 (1 + 9) / 2^9."""
    weak = made_up(tmp_path, [0.3] + [0.1] * 8 + [0.6] * 11, wrong=[19], name="none")
    strong = made_up(
        tmp_path,
        [0.2] + [0.3] * 8 + [0.6] * 10 + [None],
        cost={"train_seconds": 25.0, "certify_seconds": 10.0, "trained_here": 50, "flops_per_vote": 3e6},
    )
    result = bench("compare", weak, strong, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    (pair,) = found["pairs"]
    # .75 is out of reach: 1000 votes at alpha .001 give at most 2.463 * .25 = .616.
    assert [r["radius"] for r in pair["radii"]] == [0.0, 0.25, 0.5]
    at = {r["radius"]: r for r in pair["radii"]}
    assert (at[0.25]["only_first"], at[0.25]["only_second"]) == (1, 8)
    assert at[0.25]["certified_first"] == 11 / 20 and at[0.25]["certified_second"] == 18 / 20
    assert at[0.25]["difference"] == pytest.approx(7 / 20)
    assert at[0.25]["p"] == pytest.approx(20 / 512)
    assert at[0.25]["p_holm"] == pytest.approx(60 / 512)
    assert at[0.0]["p"] == at[0.5]["p"] == at[0.5]["p_holm"] == 1
    assert 0 < at[0.25]["low"] < 0.35 < at[0.25]["high"] < 1
    assert [(i["index"], i["label"]) for i in pair["second_ahead"]] == [(i, i % 10) for i in range(1, 6)]
    (ahead,) = pair["first_ahead"]
    radii = [read_run(run).counted[0].radius for run in (weak, strong)]
    assert ahead["index"] == 0 and ahead["lead"] == radii[0] - radii[1] > 0.09
    assert ahead["ahead"] == {"predicted": 0, "radius": radii[0]}
    assert pair["cost_ratios"] == pytest.approx(
        {"train_seconds": 2.5, "certify_seconds": 0.5, "votes": 1.0, "flops_per_vote": 3.0, "trained_here": 0.5}
    )
    assert found["differs"] == {"defense.name": ["none", "lora"]}
    text = bench("compare", weak, strong).out
    assert "| 0.25     | 55.0%   | 90.0%   | +35.0 [" in text
    assert "| 1            | 8            | 0.039 | 0.12" in text
    assert "train (s) x2.5" in text


def test_three_runs_are_all_pairs_and_corrected_over_all(bench: Bench, tmp_path: Path) -> None:
    rng = random.Random(0)
    runs = [made_up(tmp_path, [rng.uniform(0, 0.6) for _ in range(60)], name=n) for n in ("a", "b", "c")]
    found = json.loads(bench("compare", *runs, "--json").out)
    assert [(p["first"], p["second"]) for p in found["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    rows = [r for p in found["pairs"] for r in p["radii"]]
    assert len(rows) == 9
    assert [r["p_holm"] for r in rows] == pytest.approx(paired.holm([r["p"] for r in rows]))
    assert "all 9 tests" in bench("compare", *runs).out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma": 0.5}, "sigma is 0.25 and 0.5"),
        ({"dataset": "other"}, "dataset is digits and other"),
        ({"split": "validation"}, "split is test and validation"),
        ({"images": "2" * 64}, "images is 11111111 and 22222222"),
        ({"noise": {"kind": "float", "version": 1, "tau": 0.0}}, "noise is grid and float"),
        ({"bound": "hoeffding"}, "bound is clopper-pearson and hoeffding"),
        ({"procedure": FIXED | {"n": 2000}}, "procedure.n is 1000 and 2000"),
        ({"procedure": FIXED | {"n0": 10}}, "procedure.n0 is 100 and 10"),
        ({"procedure": FIXED | {"alpha": 0.01}}, "procedure.alpha is 0.001 and 0.01"),
        ({"procedure": FIXED | {"target": "label"}}, "procedure.target is selected and label"),
        ({"procedure": describe(Anytime(100, 1000, 0.001, (0.25,)))}, "procedure.radii is not stated and [0.25]"),
        ({"indices": [0, 1, 2, 4]}, "images differ (4, 4; 3 are common to all)"),
    ],
)
def test_what_must_agree_does_or_nothing_is_compared(
    bench: Bench, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    same = made_up(tmp_path / "a", [0.1, 0.2, None, None])
    other = made_up(tmp_path / "b", [0.1, 0.2, None, None], **changes)
    result = bench("compare", same, other)
    assert (result.code, result.out) == (3, "")
    assert words in result.err and result.err.count("\n") == 1


def test_base_and_defense_may_differ_and_are_listed(bench: Bench, tmp_path: Path) -> None:
    one = made_up(tmp_path, [0.1, 0.2])
    base = {"name": "other|base", "sha256": "a" * 64}
    two = made_up(tmp_path, [0.1, 0.2], name="evil|<b>`x`", base=base, seed=3, train_sigma=0.5)
    result = bench("compare", one, two)
    assert result.code == 0, result.err
    assert r"| base.name    | vit      | other\|base      |" in result.out
    for said in ("| base.sha256  | bbbbbbbb |", "| seed         | 0        |", "| train_sigma  | 0.25     |"):
        assert said in result.out
    assert "<b>" not in result.out and r"evil\|\<b\>\`x\`" in result.out


def test_labels_that_disagree_are_other_images(bench: Bench, tmp_path: Path) -> None:
    one = made_up(tmp_path / "a", [0.1, 0.2])
    two = Path(shutil.copytree(one, tmp_path / "b" / one.name))
    lines = (two / "certificates.jsonl").read_text().replace('"label": 1', '"label": 7')
    (two / "certificates.jsonl").write_text(lines)
    result = bench("compare", one, seal(two))
    assert result.code == 3 and "image 1 is labelled 1 and 7" in result.err


@pytest.mark.parametrize("case", ["one", "twice", "unfinished", "absent"])
def test_wrong_usage_is_one_line(bench: Bench, tmp_path: Path, case: str) -> None:
    one = made_up(tmp_path, [0.1, 0.2])
    two = made_up(tmp_path, [0.1, 0.2], name="none")
    if case == "unfinished":
        info = json.loads((two / "run.json").read_text())
        (two / "run.json").write_text(json.dumps(info | {"status": "started"}))
    runs = {"one": [one], "twice": [one, one], "unfinished": [one, two], "absent": [one, tmp_path / "no"]}[case]
    result = bench("compare", *runs)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("bench: ") and result.err.count("\n") == 1


def test_real_runs_compare(bench: Bench, tmp_path: Path) -> None:
    ran = bench("run", "--defense", "none,lora", "--dataset", TINY, "--set", "lora.rank=2", "--out", tmp_path)
    assert ran.code == 0, ran.err
    result = bench("compare", *sorted(tmp_path.iterdir()), "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    (pair,) = found["pairs"]
    table = {}
    for row in json.loads(bench("report", tmp_path, "--format", "json").out)["tables"][0]["rows"]:
        table[row["run"]] = row
    for side in ("first", "second"):
        row = table[Path(found["runs"][pair[side]]["run"]).name]
        for r in pair["radii"]:
            assert r[f"certified_{side}"] == pytest.approx(row[f"certified_{r['radius']:g}"])
    assert "defense.name" in found["differs"]
    assert pair["cost_ratios"]["trained_here"] is None or pair["cost_ratios"]["trained_here"] < 1


def test_radii_are_printed_rounded_down(bench: Bench, tmp_path: Path) -> None:
    """Of every image shown, the printed radius is at most the recorded one, and by less than a thousandth."""
    rng = random.Random(1)
    runs = [made_up(tmp_path, [rng.uniform(0, 0.6) for _ in range(30)], name=n) for n in ("a", "b")]
    radii = [{c.index: c.radius for c in read_run(run).counted} for run in runs]
    seen = 0
    for line in bench("compare", *runs).out.splitlines():
        cells = [c.strip() for c in line.split("|")]
        if len(cells) == 7 and " within " in line:
            for recorded, cell in zip(radii, cells[4:6], strict=True):
                assert 0 <= recorded[int(cells[1])] - float(cell.partition(" within ")[2]) < 0.001
                seen += 1
    assert seen == 20
