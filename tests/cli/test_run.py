"""Test the command line on a tiny card: run, resume, list, report, and invalid input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]


def lines(out: Path) -> dict[str, list[dict[str, object]]]:
    """Read the certificates of each run folder, sorted by image, without their timing."""
    found = {}
    for file in sorted(out.glob("*/certificates.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = sorted(({**r, "seconds": 0} for r in rows), key=lambda r: r["index"])
    return found


def test_run_report_and_list(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    ran = bench("run", "--defense", "none,retrain,full,lora", "--dataset", TINY, "--out", out)
    assert ran.code == 0, ran.err
    assert ran.out.count("\n| none") == 1
    folders = sorted(p.name for p in out.iterdir())
    assert len(folders) == 4
    for folder in folders:
        info = json.loads((out / folder / "run.json").read_text())
        rows = [json.loads(line) for line in (out / folder / "certificates.jsonl").read_text().splitlines()]
        assert info["status"] == "complete"
        assert sorted(r["index"] for r in rows) == info["identity"]["indices"]
        assert info["cost"]["votes"] == sum(r["votes"] for r in rows) == 8 * 120
        assert info["cost"]["base_forwards"] == 8 * 120
        assert info["cost"]["flops_per_vote"] > 0
        trained = info["identity"]["defense"]["name"] != "none"
        assert (info["cost"]["trainable_nominal"] > 0) == (info["cost"]["trainable_updated"] > 0) == trained
        assert (info["identity"]["defense"]["weights"] is not None) == trained
    bases = {json.loads((out / f / "run.json").read_text())["identity"]["base"]["sha256"] for f in folders}
    assert len(bases) == 1

    as_json = bench("report", out, "--format", "json")
    assert as_json.code == 0
    (table,) = json.loads(as_json.out)["tables"]
    assert {r["defense"] for r in table["rows"]} == {"none", "retrain", "full", "lora"}
    for row in table["rows"]:
        assert row["certified_0_low"] <= row["certified_0"] <= row["certified_0_high"]
        rows = [json.loads(line) for line in (out / row["run"] / "certificates.jsonl").read_text().splitlines()]
        assert row["certified_0.25"] == sum(r["predicted"] == r["label"] and r["radius"] >= 0.25 for r in rows) / 8
        assert row["abstained"] == sum(r["predicted"] is None for r in rows) / 8

    written = bench("report", out, "--out", tmp_path / "report")
    assert written.code == 0
    kinds = {p.suffix for p in (tmp_path / "report").iterdir()}
    assert kinds == {".md", ".svg", ".png", ".pdf"}
    assert bench("report", out, "--format", "csv").out.count("\n") == 5

    for what in ("defenses", "datasets", "bases", "runs"):
        listed = bench("list", what, "--json", "--out", out)
        assert listed.code == 0
        assert json.loads(listed.out)
    assert len(json.loads(bench("list", "runs", "--json", "--out", out).out)) == 4


def test_a_repeated_command_reuses_the_run_and_more_images_never_retrain(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "lora", "--dataset", TINY, "--seed", 11, "--out", tmp_path)
    assert bench(*args).code == 0
    before = lines(tmp_path)
    again = bench(*args, "--json")
    assert again.code == 0
    assert "already complete" in again.err
    (first,) = json.loads(again.out)
    assert lines(tmp_path) == before
    more = bench(*args, "--examples", 12, "--n", 150, "--json")
    assert more.code == 0
    (second,) = json.loads(more.out)
    assert second["identity"]["defense"]["weights"] == first["identity"]["defense"]["weights"]
    assert second["cost"]["train_seconds"] == first["cost"]["train_seconds"]
    assert set(first["identity"]["indices"]) < set(second["identity"]["indices"])


def test_an_interrupted_run_resumes_to_the_same_counts(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.records.writer import RunFolder

    args = ("run", "--defense", "none", "--dataset", TINY, "--out")
    assert bench(*args, tmp_path / "whole").code == 0
    real, calls = RunFolder.append, 0

    def append(self: RunFolder, certificate: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        real(self, certificate)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "append", append)
    stopped = bench(*args, tmp_path / "parts")
    assert stopped.code == 130
    assert "resume" in stopped.err
    assert [len(v) for v in lines(tmp_path / "parts").values()] == [3]
    unfinished = bench("report", tmp_path / "parts")
    assert unfinished.code == 2
    assert "3 of 8 images" in unfinished.err
    monkeypatch.setattr(RunFolder, "append", real)
    assert bench(*args, tmp_path / "parts").code == 0
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_defenses_from_a_file(bench: Bench, tmp_path: Path) -> None:
    ran = bench(
        "run",
        "--defense",
        defense("half_space"),
        "--dataset",
        TINY,
        "--out",
        tmp_path,
        "--set",
        "threshold=0.2",
        "--json",
    )
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    assert info["identity"]["defense"]["name"] == "half-space"
    assert info["identity"]["defense"]["config"] == {"threshold": 0.2}


def test_runs_with_different_settings_get_separate_tables(bench: Bench, tmp_path: Path) -> None:
    for extra in ((), ("--sigma", ".5"), ("--n", 200), ("--alpha", ".01"), ("--examples", 9)):
        assert bench("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path, *extra).code == 0
    assert len(json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]) == 5


def test_dry_run_estimates_the_cost_and_exits(bench: Bench, tmp_path: Path) -> None:
    args = (
        "run",
        "--defense",
        "none,lora",
        "--dataset",
        TINY,
        "--sigma",
        ".25,.5",
        "--out",
        tmp_path / "runs",
        "--dry-run",
    )
    said = bench(*args)
    assert said.code == 0
    assert "3,840 votes" in said.out
    rows = json.loads(bench(*args, "--json").out)
    assert [r["votes"] for r in rows] == [960] * 4
    assert all(r["seconds"] > 0 for r in rows)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--defense", "lorra"), "did you mean lora"),
        (("--dataset", "digts"), "did you mean digits"),
        (("--dataset", "./no.toml"), "no data set card"),
        (("--defense", "./no.py"), "no defense file"),
        (("--defense", ""), "--defense is empty"),
        (("--preset", "papr"), "known: quick"),
        (("--base", "vitt"), "did you mean vit"),
        (("--sigma", "0"), "--sigma 0: must be a number above 0"),
        (("--sigma", "-1"), "must be a number above 0"),
        (("--sigma", "nan"), "--sigma nan: must be a number above 0"),
        (("--sigma", "inf"), "--sigma inf: must be a number above 0"),
        (("--train-sigma", "nan"), "--train-sigma nan: must be a number above 0"),
        (("--sigma", "x"), "must be a number"),
        (("--train-sigma", "0"), "--train-sigma"),
        (("--alpha", "0"), "between 0 and 1"),
        (("--alpha", "1"), "between 0 and 1"),
        (("--n", "9"), "the smallest is --n 10"),
        (("--n0", "0"), "--n0 0"),
        (("--examples", "0"), "must be 1 to 200"),
        (("--examples", "201"), "must be 1 to 200"),
        (("--examples", "every:0"), "every:K"),
        (("--seed", "-1"), "--seed -1"),
        (("--device", "gpu"), "--device gpu"),
        (("--set", "rank"), "write key=value"),
        (("--defense", "full", "--set", "lr=nan"), "lr: nan is not a finite number"),
        (("--defense", "full", "--search", "lr=1e-3,inf"), "lr: inf is not a finite number"),
        (("--defense", "lora", "--set", "rnk=4"), "did you mean rank"),
        (("--defense", "lora", "--set", "rank=four"), "rank: "),
        (("--defense", "lora", "--set", "full.lr=1"), "unknown defense in --set"),
        (("--defense", "lora", "--set", "targets=sideways"), "targets: "),
        (("--defense", defense("raises")), "RuntimeError: out of ideas"),
        (("--defense", defense("wrong_shape")), "float tensor of shape"),
        (("--defense", defense("batch_average")), "other rows of its batch"),
        (("--no-such-flag",), "no-such-flag"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bench: Bench, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    given = {"--defense": "none", "--dataset": TINY}
    given |= {a: args[i + 1] for i, a in enumerate(args) if a in given}
    rest = [a for i, a in enumerate(args) if a not in given and (i == 0 or args[i - 1] not in given)]
    out = tmp_path / "runs"
    result = bench("run", *(x for pair in given.items() for x in pair), *rest, "--out", out)
    assert result.code == 2
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("bench: ")
    assert words in last
    assert "Traceback" not in result.err
    assert not list(out.glob("*/certificates.jsonl"))


def test_a_run_folder_of_a_newer_schema_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path)
    assert bench(*args).code == 0
    (file,) = tmp_path.glob("*/run.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 999}))
    before = file.read_bytes()
    for command in (args, ("report", tmp_path)):
        result = bench(*command)
        assert result.code == 2
        assert "newer than this bench reads" in result.err
    assert file.read_bytes() == before


def test_an_edited_defense_is_never_served_from_the_cache(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(Path(defense("half_space")).read_text())
    args = ("run", "--defense", mine, "--dataset", TINY, "--out", tmp_path / "runs")
    assert bench(*args).code == 0
    mine.write_text(mine.read_text().replace("0.3", "0.31"))
    assert bench(*args).code == 0
    assert len(lines(tmp_path / "runs")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module", "No module named"),
        ("def f(:", "SyntaxError"),
        ("x = 1", "exactly one subclass"),
    ],
)
def test_a_broken_plugin_file_is_one_line(bench: Bench, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    result = bench("run", "--defense", tmp_path / "mine.py", "--dataset", TINY, "--out", tmp_path / "runs")
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_help_and_list_import_no_torch() -> None:
    code = (
        "import sys\nfrom bench.cli import main\n"
        "for args in (['--help'], ['run', '--help'], ['list'], ['list', 'datasets'], ['status', '.']):\n"
        "    try: main(args)\n"
        "    except SystemExit as e: assert not e.code, e\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
