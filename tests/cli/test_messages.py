"""Test what a newcomer sees: consistent options and names, and errors that explain how to fix them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TINY, Result
from tests.helpers.records import made_up

Bench = Callable[..., Result]
ONE = ("run", "--defense", "none", "--dataset", TINY, "--examples", 1)


# Help -------------------------------------------------------------------------------------------------


def test_bench_alone_prints_its_help_only(bench: Bench) -> None:
    alone, asked = bench(), bench("--help")
    assert alone == asked and alone.code == 0 and not alone.err
    for command in ("run", "report", "import"):
        assert f"  {command} " in alone.out


@pytest.mark.parametrize("command", ["run", "doctor", "import", "report"])
def test_help_keeps_words_in_brackets(bench: Bench, command: str) -> None:
    said = " ".join(bench(command, "--help").out.split())
    expected = {
        "run": ["(certbench[ray])", "[defense.]key=value", "pixels of [0, 1]"],
        "import": ["pixels of [0, 1]"],
    }
    for words in expected.get(command, []):
        assert words in said


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("run --defense none --dataset d --sigma .25 .5", "with commas: --sigma .25,.5"),
        ("run --sigma .25, .5 --defense none --dataset d", "--sigma .25,.5"),
        ("run --sigma=.25 .5 --defense none --dataset d", "--sigma .25,.5"),
        ("run --defense none lora full --dataset d", "with commas: --defense none,lora,full"),
        ("run --defense none --dataset d --seed 0 1 2", "--seed 0,1,2"),
        ("run --defense none --dataset d --set rank=1 lr=2", "repeat the option for each: --set rank=1 --set lr=2"),
    ],
)
def test_values_separated_by_blanks_get_a_hint(bench: Bench, typed: str, words: str) -> None:
    result = bench(*shlex.split(typed))
    assert result.code == 2 and result.err.count("\n") == 1
    assert "unexpected extra argument" in result.err and words in result.err


# Report -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("x.html", "<!"),
        ("x.htm", "<!"),
        ("x.tex", "% needs"),
        ("x.csv", "run,"),
        ("x.json", "{"),
        ("x.md", "###"),
        ("X.JSON", "{"),
    ],
)
def test_the_name_of_the_file_decides_the_format(bench: Bench, tmp_path: Path, name: str, begin: str) -> None:
    made_up(tmp_path / "runs", [0.3, 0.1, None])
    out = tmp_path / "out" / name
    result = bench("report", tmp_path / "runs", "--out", out)
    assert result.code == 0, result.err
    assert out.read_text().startswith(begin)
    assert {f.suffix for f in out.parent.iterdir()} - {".svg", ".png", ".pdf"} == {out.suffix}


def test_a_format_that_the_name_contradicts_is_refused(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [0.3])
    for args in (("--format", "csv", "--out", "x.html"), ("--format", "md", "--out", "x.tex"), ("--out", "x.pdf")):
        refused = bench("report", tmp_path / "runs", *args[:-1], tmp_path / args[-1])
        assert refused.code == 2 and refused.err.count("\n") == 1 and args[-1] in refused.err
    assert [f.name for f in tmp_path.iterdir()] == ["runs"]
    folder = bench("report", tmp_path / "runs", "--format", "csv", "--out", tmp_path / "report-0.25")
    assert folder.code == 0 and (tmp_path / "report-0.25" / "report.csv").is_file()


def figures(bench: Bench, runs: Path, out: Path) -> dict[str, bytes]:
    assert bench("report", runs, "--out", out).code == 0
    return {f.name: f.read_bytes() for f in out.glob("*.svg")}


def test_a_figure_keeps_its_name_in_every_report(bench: Bench, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    made_up(runs, [0.3] * 10, name="one")
    first = figures(bench, runs, tmp_path / "first")
    assert len(first) == 2
    made_up(runs, [0.3] * 10, name="one", sigma=0.5)
    made_up(runs, [0.3] * 10, name="one", dataset="another")
    for votes in (500, 2000):  # of the same data set and sigma
        procedure = {"kind": "fixed", "n0": 100, "n": votes, "alpha": 0.001, "target": "selected"}
        made_up(runs, [0.1] * 10, name="one", procedure=procedure)
    made_up(runs, [0.3] * 10, name="one", split="validation")
    all_ = figures(bench, runs, tmp_path / "all")
    assert len(all_) == 12
    assert {name: all_.get(name) for name in first} == first


def test_latex_fits_a_column(bench: Bench, tmp_path: Path) -> None:
    for name, held in (("best", 30), ("close", 26), ("far", 20)):
        made_up(tmp_path, [0.3] * held + [0.1] * (40 - held), name=name)
    text = "\n".join(line for line in bench("report", tmp_path, "--out", tmp_path / "t.tex").out.splitlines() if line)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert "=" not in body
    assert body.count("{") == body.count("}")
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}")
    (columns,) = re.findall(r"\\begin\{tabular\}\{@\{\}p\{([\d.]+)\\columnwidth\}(r+)@\{\}\}", body)
    # Every row has a cell for each column; a cell may span several columns.
    for line in (
        row for row in body.splitlines() if row.rstrip().endswith(("\\\\", "\\\\[1pt]")) and "provide" not in row
    ):
        spanned = sum(int(k) - 1 for k in re.findall(r"\\multicolumn\{(\d+)\}", line))
        assert len(re.findall(r"(?<!\\)&", line)) + spanned == len(columns[1]), line
    # 34 points for a value with its interval, 5 between two values, in a column of 229 points.
    assert 229 * float(columns[0]) + len(columns[1]) * 39 <= 231
    rows = {line.split(" &")[0]: line for line in reversed(body.splitlines())}
    assert r"\certified{\textbf{75.0}}" in rows["best"] and r"\certified{\textbf{65.0}}" in rows["close"]
    assert r"\certified{50.0}" in rows["far"]
    assert body.count(r"\begin{table}[t]") == body.count(r"\end{table}") == body.count(r"\label{tab:") == 1
    assert re.search(r"\\caption\{digits, sigma 0\.25: .*bold: the best of a column", body)
    assert "% needs \\usepackage{booktabs}" in text


def test_the_best_of_a_column_is_bold_even_where_all_others_are_significantly_worse(
    bench: Bench, tmp_path: Path
) -> None:
    for name, held in (("best", 40), ("far", 5)):
        made_up(tmp_path, [0.3] * held + [0.1] * (40 - held), name=name)
    lines = bench("report", tmp_path, "--format", "latex").out.splitlines()
    best, far = (next(line for line in lines if line.startswith(f"{name} &")) for name in ("best", "far"))
    assert r"\certified{\textbf{100.0}}{[91.2, 100.0]} & \certified{\textbf{100.0}}" in best
    assert r"\certified{\textbf{100.0}}" in far and r"\certified{12.5}" in far  # equal at 0, worse at 0.25
    alone = bench("report", next(iter(tmp_path.iterdir())), "--format", "latex").out
    assert r"\textbf" not in alone and "bold" not in alone


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_latex_compiles_within_a_column(bench: Bench, tmp_path: Path) -> None:
    """With five radii, a best-sigma curve, published rows and names that LaTeX would take for commands."""
    for name in ("denoiser objective=mse", r"[b_| \~^ <b> {}% &$#"):
        for split in ("test", "validation"):
            for sigma in (0.25, 0.5):
                changes: dict[str, Any] = {
                    "sigma": sigma,
                    "train_sigma": sigma,
                    "split": split,
                    "images": split,
                    "dataset": "cifar10",
                }
                run = made_up(tmp_path / "runs", [0.3] * 30 + [0.1] * 10, name=name, **changes)
                info = json.loads((run / "run.json").read_text())
                (run / "run.json").write_text(json.dumps(info | {"radii": [0.0, 0.25, 0.5, 0.75, 1.0]}))
    table = bench("report", tmp_path / "runs", "--published", "--format", "latex").out
    assert "Cohen" in table and "best-sigma curve" in table
    page = "\\documentclass[twocolumn]{article}\\usepackage{booktabs}\\begin{document}\n" + table + "\\end{document}\n"
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout
    assert "Overfull \\hbox" not in done.stdout


# Compare, status and list -----------------------------------------------------------------------------


def test_compare_of_a_folder_compares_its_runs(bench: Bench, tmp_path: Path) -> None:
    one, two = made_up(tmp_path, [0.3] * 10, name="one"), made_up(tmp_path, [0.1] * 10, name="two")
    assert json.loads(bench("compare", tmp_path, "--json").out) == json.loads(bench("compare", one, two, "--json").out)
    other = made_up(tmp_path, [0.1] * 10, name="other", sigma=0.5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    result = bench("compare", tmp_path, "--json")
    assert result.code == 0
    assert [r["run"] for r in json.loads(result.out)["runs"]] == [str(one), str(two)]
    assert f"left out: {other}: no other run" in result.err and "left out: " + str(tmp_path / "broken") in result.err
    made_up(tmp_path, [0.3] * 10, name="more", sigma=0.5)
    text = bench("compare", tmp_path).out
    assert text.count("## digits, sigma") == 2 and "sigma 0.25" in text and "sigma 0.5" in text


def test_compare_of_a_folder_without_two_runs_is_one_line(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [0.3] * 10)
    for folder in (tmp_path / "runs", tmp_path / "nothere"):
        result = bench("compare", folder)
        assert result.code == 2 and "Traceback" not in result.err


def test_status_of_a_missing_folder_is_exit_2(bench: Bench, tmp_path: Path) -> None:
    result = bench("status", tmp_path / "nothere")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"bench: no folder {tmp_path / 'nothere'}; create runs with bench run\n"
    assert bench("status", tmp_path).code == 0  # an empty folder


def test_list_and_status_use_the_same_words(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path, [0.3] * 3)
    begun = made_up(tmp_path, [0.3] * 4, name="begun")
    info = json.loads((begun / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps(info | {"status": "started"}))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    listed = json.loads(bench("list", "runs", "--out", tmp_path, "--json").out)
    rows = json.loads(bench("status", tmp_path, "--json").out)
    assert [(r["run"], r["state"]) for r in listed] == [(r["run"], r["state"]) for r in rows]
    assert {r["state"] for r in rows} == {"complete", "stopped", "unreadable"}
    assert [r["images"] for r in listed if r["state"] == "complete"] == ["3/3"]


# Runs -------------------------------------------------------------------------------------------------


def test_a_run_has_one_name_before_and_after_it_has_a_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.records import status
    from bench.runs import fitting

    seen: list[dict[str, Any]] = []
    real = fitting.fit

    def fit(*args: Any) -> Any:
        seen.extend(row.as_json() for row in status.rows(tmp_path))
        return real(*args)

    monkeypatch.setattr(fitting, "fit", fit)
    assert bench(*ONE, "--out", tmp_path).code == 0
    (begun,) = seen
    (folder,) = tmp_path.iterdir()
    assert begun["run"] == "tiny-none-s0.25-..." and folder.name.startswith(begun["run"].removesuffix("..."))


def test_the_lines_of_a_dry_run_differ(bench: Bench, tmp_path: Path) -> None:
    args = ("--seed", "0,1", "--set", "clip=true,false", "--sigma", ".25,.5", "--dry-run", "--out", tmp_path)
    lines = [line.partition(":")[0] for line in bench(*ONE, *args).out.splitlines()[:-1]]
    assert len(lines) == len(set(lines)) == 8
    assert "tiny-none-s0.25, clip=True, seed 1" in lines


@pytest.mark.parametrize("place", ["build", "logits"])
def test_an_error_names_the_log_with_its_traceback(bench: Bench, tmp_path: Path, place: str) -> None:
    body = {"build": "def build(self): 1 / 0\n", "logits": "def logits(self, x, draw): 1 / 0\n"}[place]
    text = "from bench.interface import Access, Defense\n\n\nclass Mine(Defense):\n    access = Access.QUERY\n\n    "
    (tmp_path / "mine.py").write_text(text + body)
    failed = bench("run", "--defense", tmp_path / "mine.py", "--dataset", TINY, "--out", tmp_path / "runs")
    assert failed.code == 2
    last = failed.err.splitlines()[-1]
    assert "ZeroDivisionError" in last
    log = Path(last.partition("; traceback in ")[2])
    assert log.is_file() and "Traceback (most recent call last)" in log.read_text()


ROWS = """
from pathlib import Path
from bench.interface import Access, Defense

class Counts(Defense):
    access = Access.QUERY

    def logits(self, x, draw):
        with Path({file!r}).open("a") as f:
            f.write(f"{{len(x)}}\\n")
        return self.context.base(x)
"""


def test_a_dry_run_of_a_slow_model_times_few_rows_and_reports_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.runs import estimate

    seen = tmp_path / "rows"
    (tmp_path / "counts.py").write_text(ROWS.format(file=str(seen)))
    args = ("run", "--defense", tmp_path / "counts.py", "--dataset", TINY, "--dry-run", "--out", tmp_path / "runs")
    assert "rows of a block" not in bench(*args).out
    seen.unlink()
    monkeypatch.setattr(estimate, "LONG", 0.0)  # every model is slow
    said = bench(*args)
    assert "timed on 1 of 256 rows of a block in 1 of 1 runs" in said.out
    assert [int(n) for n in seen.read_text().split()] == [1, 1, 1]  # a warm-up, the timing, the count of operations
    (row,) = json.loads(bench(*args, "--json").out)
    assert (row["timed_rows"], row["block"]) == (1, 256) and row["seconds"] > 0 and row["flops_per_vote"] > 0


def test_names_of_runs_are_listed_as_they_are(bench: Bench, tmp_path: Path) -> None:
    """Not as the pictures or the colours that a terminal's library reads into them."""
    name = "x[bold] :smile:"
    made_up(tmp_path / "runs", [0.3], name=name)
    for command in (("list", "runs", "--out", tmp_path / "runs"), ("status", tmp_path / "runs")):
        assert name in bench(*command).out
