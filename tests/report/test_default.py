"""The default columns: at most eight, whatever the number of radii, and at most 100 columns of a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import tables, terminal, text
from bench.report.tables import Report
from tests.helpers import records
from tests.helpers.commands import TINY, Bench
from tests.helpers.records import made_up

NAMES = ["none", "head", "bitfit", "lora", "adapter", "prompt", "full", "retrain", "denoiser", "diffusion-and-lora" * 3]
COST = {
    "trained_here": 123_456_789,
    "train_seconds": 98_765.4,
    "certify_seconds": 43_210.9,
    "flops_per_vote": 1.234e12,
}
PROCEDURE = {"kind": "fixed", "n0": 100, "n": 100_000, "alpha": 0.001, "target": "selected"}


def built(out: Path, radii: int, rows: int, monkeypatch: pytest.MonkeyPatch, images: int = 60) -> Report:
    """Report methods that differ, with the costs of a large model, at sigma .5 (reach above 1.8)."""
    monkeypatch.setattr(records, "RADII", [0.25 * i for i in range(radii)])
    for i, name in enumerate(NAMES[:rows]):
        held = images - 5 * i
        made_up(out, [1.0] * held + [0.1] * (images - held), name=name, cost=COST, sigma=0.5, procedure=PROCEDURE)
    return tables.build(tables.load_records(out)[0])


@pytest.mark.parametrize("radii", [1, 2, 3, 4, 5, 6, 7])
def test_at_most_eight_columns_hold_or_state_every_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, radii: int
) -> None:
    (table,) = built(tmp_path, radii, 2, monkeypatch).tables
    few = table.few
    assert few.cells.shape[1] <= 8 and "ACR" not in few.cells
    titles = "\n".join(map(str, few.cells)).split("\n")
    assert [t for t in titles if t.startswith("r = ")] == [f"r = {0.25 * i:g}" for i in range(min(radii, 5))]
    costs = ["trained here", "GFLOPs/vote", "train (s)", "certify (s)"]
    assert [t for t in titles if t in costs] == costs
    first = "\n".join(few.cells.iloc[0]).split("\n")
    assert {"123,456,789", "1234", "98,765.4", "43,210.9"} <= set(first)
    assert ("base, clean" in titles) != ("Clean accuracy of the base: 90.0%." in few.note)
    assert ("Further radii: 1.25" in few.note) == (radii > 5)
    assert "ACR" in table.cells and table.cells.shape[1] > 15


@pytest.mark.parametrize("rows", [2, 10])
@pytest.mark.parametrize("radii", [2, 5])
def test_a_terminal_shows_the_verdict_first_in_100_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, radii: int
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    report = built(tmp_path, radii, rows, monkeypatch)
    shown = terminal.render(report)
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.index("certifies the most images") < shown.index("\ndefense")
    words, (table,) = set(shown.split()), report.tables
    for cells in table.few.cells.itertuples(index=False):
        assert {word for cell in cells[1:] for word in cell.split()} <= words  # no number is broken or cut
    grid = shown[shown.index("\ndefense") + 1 :].split("\n\n")[0].splitlines()
    names = "".join(line.split("  ")[0] for line in grid if not line.startswith(" "))
    assert all(name in names for name in NAMES[:rows])  # a long name goes on in further lines


def test_names_of_records_are_escaped_on_a_terminal(tmp_path: Path) -> None:
    made_up(tmp_path, [0.3] * 10, name="[red]x[bold] :smile: \x1b[31m")
    shown = terminal.render(tables.build(tables.load_records(tmp_path)[0]))
    assert "\x1b" not in shown and "[red]x[bold]" in shown and ":smile:" in shown and r"\x1b[31m" in shown


def test_markdown_csv_and_json_have_all_columns_where_asked_or_always(bench: Bench, tmp_path: Path) -> None:
    made_up(tmp_path, [0.3] * 10)
    assert " ACR " not in bench("report", tmp_path).out
    assert " ACR " in bench("report", tmp_path, "--columns", "all").out
    assert bench("report", tmp_path, "--columns", "all", "--out", tmp_path / "t.md").code == 0
    assert " ACR " in (tmp_path / "t.md").read_text()
    for format in ("csv", "json"):
        few, every = (bench("report", tmp_path, "--format", format, *flags) for flags in ((), ("--columns", "all")))
        assert few.out == every.out and "acr" in few.out
    refused = bench("report", tmp_path, "--format", "latex", "--columns", "all")
    assert refused.code == 2 and "use md, or csv and json" in refused.err
    unknown = bench("report", tmp_path, "--columns", "al")
    assert unknown.code == 2 and "did you mean all?" in unknown.err


def test_bench_run_prints_the_columns_asked_for(bench: Bench, tmp_path: Path) -> None:
    command = ("run", "--defense", "none", "--dataset", TINY, "--device", "cpu", "--out", tmp_path / "runs")
    refused = bench(*command, "--columns", "every")
    assert refused.code == 2 and "--columns" in refused.err and not (tmp_path / "runs").exists()
    assert " ACR " not in bench(*command).out
    assert " ACR " in bench(*command, "--columns", "all").out
    (info,) = json.loads(bench(*command, "--json").out)
    assert info["metrics"]["acr"] >= 0 and "columns" not in info["arguments"]


def on_terminal(*words: object) -> str:
    """Run ``bench`` on a pseudo-terminal of 100 columns and return what it shows."""
    import pty

    parent, child = pty.openpty()
    env = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-m", "bench", *map(str, words)], stdout=child, env=env) as process:
        os.close(child)
        out = io.BytesIO()
        try:
            while data := os.read(parent, 4096):
                out.write(data)
        except OSError:  # Linux reports the end of a pseudo-terminal so
            pass
    os.close(parent)
    assert process.returncode == 0
    return out.getvalue().decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_gets_its_layout_and_a_pipe_markdown(bench: Bench, tmp_path: Path) -> None:
    for name, held in (("one", 9), ("two", 3)):
        made_up(tmp_path, [0.3] * held + [0.1] * (10 - held), name=name)
    shown = on_terminal("report", tmp_path)
    assert max(map(len, shown.splitlines())) <= 100 and "|" not in shown
    assert shown.index("At r = 0.25 one certifies the most images") < shown.index("\ndefense ")
    report = tables.build(tables.load_records(tmp_path)[0])
    markdown = text.render(report, "md")
    assert on_terminal("report", tmp_path, "--format", "md") == markdown == bench("report", tmp_path).out
    assert on_terminal("report", tmp_path, "--columns", "all") == text.render(report, "md", every=True)
