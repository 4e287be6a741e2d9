"""bench check: losses fail, chance and improvements pass, runs that are not comparable or forged are refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cli import main
from bench.records import paired
from tests.helpers.commands import TINY, Result
from tests.helpers.records import made_up

Bench = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "baseline.json"
LEVEL, POINTS = 0.01, 2.0
GOOD, POOR = 950, 300  # votes of 1000: certified at .25, and abstained


def votes(good: int, images: int = 100, shift: int = 0) -> list[int]:
    """Return counts of a run that certifies ``good`` images at .25, from the image ``shift`` on."""
    return [GOOD if shift <= i < shift + good else POOR for i in range(images)]


def edit(run: Path, **change: Any) -> Path:
    """Change fields of run.json other than the identity."""
    info = json.loads((run / "run.json").read_text())
    for key, value in change.items():
        info[key] = {**info[key], **value} if isinstance(value, dict) else value
    (run / "run.json").write_text(json.dumps(info))
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run that certifies 80 of 100 images at .25, and its baseline."""
    folder = tmp_path_factory.mktemp("made")
    made_up(folder / "old", votes(80), counted=True)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(folder / "old"), "--baseline", str(folder / "b.json"), "--update"])
    assert not stop.value.code
    return folder


@pytest.fixture
def baseline(made: Path, tmp_path: Path) -> Path:
    """Copies of both for one test."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "b.json"


# An edited source is another identity of the same method, as it is after every change to a defense.
EDITED = {
    **{"name": "lora", "source": "f" * 64, "config": {"rank": 4}, "weights": "9" * 64, "parts": {}},
    "objective": "gaussian",
}


def test_what_was_made_a_baseline_passes(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    result = bench("check", tmp_path / "old", "--baseline", baseline)
    assert result.code == 0, result.err
    assert "passes 1; of 1" in result.out
    assert "counts are equal on every image" in result.out
    assert "| 0.25     | 80       | 80    | 0      | 0     | 1   | 1        |" in result.out


@pytest.mark.parametrize(
    ("good", "points", "code"),
    [(80, 2, 0), (75, 2, 0), (60, 2, 1), (60, 30, 0), (95, 2, 0), (0, 100, 0), (0, 80, 1)],
)
def test_a_loss_fails_where_it_is_no_chance_and_large_enough(
    bench: Bench, baseline: Path, tmp_path: Path, good: int, points: int, code: int
) -> None:
    made_up(tmp_path / "new", votes(good), counted=True, defense=EDITED)
    result = bench("check", tmp_path / "new", "--baseline", baseline, "--points", points, "--json")
    assert result.code == code, result.err
    (entry,) = json.loads(result.out)["entries"]
    assert entry["verdict"] == ("regresses" if code else "passes")
    at = {r["radius"]: r for r in entry["radii"]}
    assert list(at) == [0, 0.25, 0.5]
    assert (at[0.25]["lost"], at[0.25]["won"]) == (max(0, 80 - good), max(0, good - 80))
    assert at[0.25]["p"] == pytest.approx(2.0 ** -max(0, 80 - good))
    assert any("certified at r = 0.25" in w for w in entry["wrong"]) == bool(code)
    assert "other source, weights" in entry["notes"][0]


def test_images_that_fall_both_ways_are_chance(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    """Twenty lost and fifteen won is a loss of five points, and nothing."""
    made_up(tmp_path / "new", votes(75, shift=20), counted=True, defense=EDITED)
    result = bench("check", tmp_path / "new", "--baseline", baseline, "--json")
    row = json.loads(result.out)["entries"][0]["radii"][1]
    assert (result.code, row["lost"], row["won"]) == (0, 20, 15)


def test_holm_is_over_all_entries(bench: Bench, tmp_path: Path) -> None:
    """Nine lost are p = 1/512 each: too many for three radii of one run, not for those of two."""
    for name in ("a", "b"):
        run = made_up(tmp_path / "old", votes(80), name=name, counted=True)
        change = EDITED | {"name": name}
        made_up(tmp_path / "one", votes(71), name=name, counted=True, defense=change)
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    result = bench("check", tmp_path / "one", "--baseline", tmp_path / "b.json", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    rows = [r for e in found["entries"] for r in e["radii"]]
    assert [r["p_holm"] for r in rows] == pytest.approx(paired.holm([r["p"] for r in rows]))
    assert found["gate"]["tests"] == len(rows) == 6
    bench("check", run, "--baseline", tmp_path / "b.json", "--update")
    assert bench("check", tmp_path / "one", "--baseline", tmp_path / "b.json").code == 1


@pytest.mark.parametrize("key", ["base_forwards", "parameters", "trained_here", "flops_per_vote"])
@pytest.mark.parametrize("more", [True, False])
def test_costs_are_exact(bench: Bench, tmp_path: Path, key: str, more: bool) -> None:
    cost = {"base_forwards": 110000, "parameters": 500, "trained_here": 100, "flops_per_vote": 1e6}
    made_up(tmp_path / "old", votes(80), counted=True, cost=cost)
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    changed = cost | {key: cost[key] * (2 if more else 0.5)}
    run = made_up(tmp_path / "new", votes(80), counted=True, cost=changed, defense=EDITED)
    result = bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json")
    assert result.code == int(more)
    assert f"costs {'more' if more else 'less'}: " in result.out
    edit(run, environment={"packages": {"torch": "other"}})
    other = bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json")
    assert other.code == int(more and key != "flops_per_vote")
    assert ("not judged" in other.out) == (key == "flops_per_vote")


def test_seconds_only_warn_and_only_with_a_calibration(bench: Bench, tmp_path: Path) -> None:
    def made(out: str, seconds: float, unit: float | None) -> None:
        cost = {"certify_seconds": seconds, "calibration_seconds": unit}
        made_up(tmp_path / out, votes(80), counted=True, cost=cost)

    made("old", 20.0, 0.01)
    made("slower", 40.0, 0.01)
    made("machine", 40.0, 0.02)
    made("faster", 10.0, 0.01)
    made("resumed", 40.0, None)
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    said = {
        name: bench("check", tmp_path / name, "--baseline", tmp_path / "b.json")
        for name in ("slower", "machine", "faster", "resumed")
    }
    assert [r.code for r in said.values()] == [0] * 4
    assert "warning: a vote takes 2.00 times as long" in said["slower"].out
    assert "a vote takes" not in said["machine"].out
    assert "a vote takes 0.50 of the time" in said["faster"].out
    assert "seconds not compared" in said["resumed"].out
    edit(next((tmp_path / "slower").glob("*")), environment={"device": "other"})
    other = bench("check", tmp_path / "slower", "--baseline", tmp_path / "b.json")
    assert "seconds not compared: another processor" in other.out and "warning" not in other.out
    edit(next((tmp_path / "slower").glob("*")), environment={"device": None})
    tolerant = bench("check", tmp_path / "slower", "--baseline", tmp_path / "b.json", "--factor", 2.5)
    assert "warning" not in tolerant.out


def test_the_same_identity_must_give_the_same_counts(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    counts = votes(80)
    counts[7] += 1
    run = made_up(tmp_path / "new", counts, counted=True)
    result = bench("check", tmp_path / "new", "--baseline", baseline)
    assert result.code == 1
    assert "not reproduced: image 7 has 951 of 1000 votes" in result.out
    edit(run, environment={"packages": {"torch": "other"}})
    other = bench("check", tmp_path / "new", "--baseline", baseline)
    assert other.code == 0
    assert "counts not compared: versions or machine differ (packages)" in other.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"procedure": {"kind": "fixed", "n0": 100, "n": 2000, "alpha": 0.001, "target": "selected"}},
            "procedure.n is 2000, was 1000",
        ),
        ({"seed": 1}, "seed is 1, was 0"),
        ({"base": {"name": "vit", "sha256": "a" * 64}}, "base.sha256 is aaaaaaaa, was bbbbbbbb"),
        ({"defense": EDITED | {"config": {"rank": 8}}}, "config.rank is 8, was 4"),
        ({"device": "cuda"}, "device is cuda, was cpu"),
    ],
)
def test_what_is_not_comparable_is_exit_3_with_what_differs(
    bench: Bench, baseline: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    made_up(tmp_path / "new", votes(0), counted=True, **changes)
    result = bench("check", tmp_path / "new", "--baseline", baseline)
    assert result.code == 3
    assert f"the nearest run differs: {words}\n" in result.out
    assert result.err == f"bench: not comparable 1; of 1 in {baseline}\n"
    assert "A regression is" not in result.out


def test_a_regression_and_a_missing_run_are_a_regression(bench: Bench, tmp_path: Path) -> None:
    for name in ("none", "lora"):
        made_up(tmp_path / "old", votes(80), name=name, counted=True)
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    made_up(tmp_path / "new", votes(10), counted=True, defense=EDITED)
    made_up(tmp_path / "new", votes(10), counted=True, name="further")
    result = bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json", "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert {e["name"].split(",")[0]: e["verdict"] for e in found["entries"]} == {
        "none": "not comparable",
        "lora": "regresses",
    }
    (extra,) = found["not_in_baseline"]
    assert "further" in extra


def test_the_baseline_is_as_it_was(bench: Bench, tmp_path: Path) -> None:
    """Byte for byte: a change of the format is made on purpose, with another version."""
    made_up(tmp_path / "old", [GOOD, POOR, 1000, 700], wrong=[3], counted=True)
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    assert (tmp_path / "b.json").read_text() == GOLDEN.read_text()
    assert bench("check", tmp_path / "old", "--baseline", GOLDEN).code == 0
    lines = GOLDEN.read_text().splitlines()
    assert sum(bool(re.fullmatch(r" +\[\d, (null|[\d.]+), 1000, \d+\],?", line)) for line in lines) == 4


def test_update_lists_what_changed_and_round_trips(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    again = bench("check", tmp_path / "old", "--baseline", baseline, "--update")
    assert again.out.startswith("unchanged: lora, digits, sigma 0.25, seed 0\n")
    made_up(tmp_path / "new", votes(60), counted=True, defense=EDITED)
    made_up(tmp_path / "new", votes(60), counted=True, name="none")
    assert bench("check", tmp_path / "new", "--baseline", baseline).code == 1
    said = bench("check", tmp_path / "new", "--baseline", baseline, "--update").out
    assert "changed: lora, digits, sigma 0.25, seed 0: of 100 images 60 at r = 0" in said
    assert "was of 100 images 80 at r = 0" in said
    assert "added: none, digits" in said
    assert bench("check", tmp_path / "new", "--baseline", baseline).code == 0
    gone = bench("check", tmp_path / "old", "--baseline", baseline, "--update").out
    assert "removed: none, digits" in gone
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("case", ["unfinished", "empty", "twice", "forged", "imported"])
def test_update_refuses_and_leaves_the_file(bench: Bench, baseline: Path, tmp_path: Path, case: str) -> None:
    new = tmp_path / "new"
    new.mkdir()
    if case != "empty":
        run = made_up(new, votes(90), counted=True)
    if case == "unfinished":
        edit(run, status="started")
    if case == "twice":
        made_up(new, votes(90), counted=True, defense=EDITED)
    if case == "forged":
        file = run / "certificates.jsonl"
        file.write_text(file.read_text().replace('"top_count": 300', '"top_count": 999'))
    if case == "imported":
        log = tmp_path / "log.tsv"
        log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.3\t1\t1.0\n")
        args = ("--dataset", "other", "--sigma", 0.25, "--alpha", 0.001, "--n", 1000)
        assert bench("import", log, *args, "--out", new).code == 0
    before = baseline.read_bytes()
    result = bench("check", new, "--baseline", baseline, "--update")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("bench: ") and result.err.count("\n") == 1
    words = {"unfinished": "unfinished", "empty": "no finished run", "twice": "is in", "imported": "imported"}
    assert words.get(case, "bench verify") in result.err
    assert baseline.read_bytes() == before


@pytest.mark.parametrize(
    ("pattern", "edited"),
    [
        (r"\[5, 0\.\d+, 1000, 950\]", "[5, null, 1000, 300]"),
        (r'"votes": 110000', '"votes": 120000'),
        (r'"sigma": 0.25', '"sigma": 0.5'),
        (r'"certbench_baseline": 1', '"certbench_baseline": 2'),
        (r'"base": "same weights"', '"base": "whatever"'),
        (r'"certbench_baseline": 1,', ""),
        (r"}\n$", ""),
    ],
)
@pytest.mark.parametrize("update", [(), ("--update",)])
def test_an_edited_baseline_is_refused(
    bench: Bench, baseline: Path, tmp_path: Path, pattern: str, edited: str, update: tuple[str, ...]
) -> None:
    text, times = re.subn(pattern, edited, baseline.read_text(), count=1)
    assert times == 1
    baseline.write_text(text)
    result = bench("check", tmp_path / "old", "--baseline", baseline, *update)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"bench: {baseline}") and result.err.count("\n") == 1
    assert baseline.read_text() == text


def test_wrong_usage_is_one_line(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    made_up(tmp_path / "two", votes(80), counted=True)
    made_up(tmp_path / "two", votes(80), counted=True, defense=EDITED)
    for args, words in (
        ((old, "--baseline", tmp_path / "absent.json"), "create it with bench check --baseline"),
        ((old, "--baseline", baseline, "--any-base"), "give them with --update"),
        ((old, "--baseline", baseline, "--points", -1), "--points"),
        ((old, "--baseline", baseline, "--factor", 0.5), "--factor"),
        ((old,), "--baseline"),
        ((tmp_path / "two", "--baseline", baseline), "move one away"),
    ):
        result = bench("check", *args)
        assert (result.code, result.out) == (2, "")
        assert words in result.err and result.err.count("\n") == 1


def test_a_forged_run_is_refused(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    file = made_up(tmp_path / "new", votes(60), counted=True, defense=EDITED) / "certificates.jsonl"
    file.write_text(file.read_text().replace('"predicted": null', '"predicted": 3'))
    result = bench("check", tmp_path / "new", "--baseline", baseline)
    assert result.code == 2 and "bench verify" in result.err


def test_a_retrained_base_is_allowed_by_the_baseline(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    made_up(tmp_path / "new", votes(80), counted=True, base={"name": "vit", "sha256": "a" * 64})
    again = ("check", tmp_path / "new", "--baseline", baseline)
    assert bench(*again).code == 3
    old = ("check", tmp_path / "old", "--baseline", baseline, "--update")
    assert "base: trained anew, was same weights" in bench(*old, "--any-base").out
    passes = bench(*again)
    assert passes.code == 0
    assert "counts may differ: other base" in passes.out and "a retrained base: weights may differ" in passes.out
    bench(*old)
    assert bench(*again).code == 0
    bench(*old, "--same-base")
    assert bench(*again).code == 3
    made_up(tmp_path / "arch", votes(80), counted=True, base={"name": "other", "sha256": "a" * 64})
    bench(*old, "--any-base")
    assert bench("check", tmp_path / "arch", "--baseline", baseline).code == 3


def test_github_sees_annotations_that_nothing_can_break_out_of(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "a,b:%0A\n::error::gone ##[error]x"
    made_up(tmp_path / "old", votes(80), counted=True, defense=EDITED | {"name": evil})
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    run = made_up(tmp_path / "new", votes(10), counted=True, defense=EDITED | {"name": evil, "source": "0" * 64})
    quiet = bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json")
    assert quiet.code == 1 and quiet.err == ""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    edit(run, cost={"certify_seconds": 90.0, "calibration_seconds": 0.01})
    result = bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json", "--json")
    assert json.loads(result.out)["entries"][0]["verdict"] == "regresses"
    lines = result.err.splitlines()
    assert lines and all(line.startswith("::error title=regresses%3A a%2Cb%3A%250A%0A") for line in lines)
    assert "certified at r = 0.25: 10 of 100 images" in result.err
    shown = (tmp_path / "summary.md").read_text()
    assert shown.startswith("before\n## bench check: regresses 1")
    for text in (shown, quiet.out):
        assert not any(line.lstrip().startswith("::") for line in text.splitlines())
        assert "##[" not in text


WELL = """
from torch import Tensor

from bench.interface import Access, Defense, Draw


class Mine(Defense):
    access = Access.QUERY

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x)
"""


def test_a_worsened_defense_is_caught_and_an_improved_one_accepted(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    base = ROOT / "reports" / "baselines" / "digits-vit.safetensors"
    args = ("--defense", mine, "--dataset", "digits", "--base", base, "--examples", 60, "--n0", 10, "--n", 100)

    def run(source: str, out: str) -> Path:
        mine.write_text(source)
        assert (ran := bench("run", *args, "--out", tmp_path / out)).code == 0, ran.err
        return tmp_path / out

    worse = WELL.replace("base(x)", "base(x.flip(-1))")
    well, bad = run(WELL, "well"), run(worse, "bad")
    made = bench("check", well, "--baseline", tmp_path / "b.json", "--update")
    assert made.code == 0, made.err
    caught = bench("check", bad, "--baseline", tmp_path / "b.json")
    assert caught.code == 1 and "certified at r = 0:" in caught.out
    assert bench("check", well, "--baseline", tmp_path / "b.json").code == 0
    bench("check", bad, "--baseline", tmp_path / "b.json", "--update")
    assert bench("check", well, "--baseline", tmp_path / "b.json").code == 0
    # Two passes through the base for one vote: no less accurate, but dearer.
    twice = run(WELL.replace("base(x)", "base(x) + 0 * self.context.base(x)"), "twice")
    bench("check", well, "--baseline", tmp_path / "b.json", "--update")
    dearer = bench("check", twice, "--baseline", tmp_path / "b.json")
    assert dearer.code == 1 and "costs more: forwards per vote: 2, was 1" in dearer.out


def test_a_missing_run_is_created_by_the_command_in_the_message(bench: Bench, tmp_path: Path) -> None:
    args = ("--dataset", TINY, "--sigma", "0.5", "--n", 150, "--set", "clip=true", "--noise", "float")
    assert bench("run", "--defense", "none", *args, "--out", tmp_path / "old").code == 0
    info = json.loads(next((tmp_path / "old").glob("*/run.json")).read_text())
    assert 0 < info["cost"]["calibration_seconds"] < 1
    bench("check", tmp_path / "old", "--baseline", tmp_path / "b.json", "--update")
    result = bench("check", tmp_path / "absent", "--baseline", tmp_path / "b.json", "--json")
    assert result.code == 3
    (entry,) = json.loads(result.out)["entries"]
    assert entry["wrong"][0] == "No matching run found."
    command = shlex.split(entry["wrong"][-1].removeprefix("Create it with: "))
    assert command[:2] == ["bench", "run"]
    assert bench(*command[1:], "--out", tmp_path / "new").code == 0
    assert bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json").code == 0
    edit(next((tmp_path / "new").glob("*")), status="started")
    unfinished = bench("check", tmp_path / "new", "--baseline", tmp_path / "b.json")
    assert unfinished.code == 3 and "is unfinished" in unfinished.out


def test_a_resumed_run_has_no_calibration(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.records.writer import RunFolder

    real, calls = RunFolder.append, 0

    def append(self: RunFolder, certificate: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        real(self, certificate)

    monkeypatch.setattr(RunFolder, "append", append)
    args = ("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path)
    assert bench(*args).code == 130
    monkeypatch.setattr(RunFolder, "append", real)
    assert bench(*args).code == 0
    (file,) = tmp_path.glob("*/run.json")
    assert json.loads(file.read_text())["cost"]["calibration_seconds"] is None


def test_the_gate_states_what_it_finds(bench: Bench, baseline: Path, tmp_path: Path) -> None:
    found = json.loads(bench("check", tmp_path / "old", "--baseline", baseline, "--json").out)
    gate = found["gate"]
    assert (gate["tests"], gate["images"]) == (3, 100)
    for seen in gate["seen"]:
        at = [
            paired.power(100, lost / 100 + seen["churn"] / 2, seen["churn"] / 2, LEVEL / 3, POINTS)
            for lost in (seen["points"] - 1, seen["points"])
        ]
        assert at[0] < 0.8 <= at[1]
    first, second = (s["points"] for s in gate["seen"])
    assert f"from {first} points where 0% of the images also change" in (
        text := bench("check", tmp_path / "old", "--baseline", baseline).out
    )
    assert f"or {second} points where 10% of the images also change" in text
