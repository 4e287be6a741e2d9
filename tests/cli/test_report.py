"""bench report: LaTeX, figures, published rows; every number from a record, everything from a file escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from bench.records import grouping
from bench.records.record import read_run
from bench.report import published
from tests.helpers.commands import TINY, Result
from tests.helpers.records import made_up

Bench = Callable[..., Result]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the tiny card."""
    from bench.cli import main

    out = tmp_path_factory.mktemp("runs")
    with pytest.raises(SystemExit) as stop:
        main(["run", "--defense", "none,full", "--dataset", TINY, "--out", str(out)])
    assert not stop.value.code
    return out


def test_latex_has_booktabs_and_the_numbers_of_the_json(bench: Bench, runs: Path, tmp_path: Path) -> None:
    result = bench("report", runs, "--format", "latex")
    assert result.code == 0
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\usepackage{booktabs}"):
        assert word in result.out
    (table,) = json.loads(bench("report", runs, "--format", "json").out)["tables"]
    for row in table["rows"]:
        line = next(line for line in result.out.splitlines() if line.startswith(f"{row['defense']} &"))
        bold = f"\\textbf{{{100 * row['certified_0']:.1f}}}"
        value = bold if bold in line else bold[8:-1]
        low, high = (100 * row[f"certified_0_{end}"] for end in ("low", "high"))
        assert f"& \\certified{{{value}}}{{[{low:.1f}, {high:.1f}]}} &" in line
    # Every % of a table is escaped: LaTeX would drop the rest of the line.
    body = result.out[result.out.index(r"\toprule") : result.out.index(r"\bottomrule")]
    assert not re.search(r"(?<!\\)%", body)
    written = bench("report", runs, "--format", "latex", "--out", tmp_path / "paper.tex")
    assert written.code == 0
    (figure,) = {p.stem for p in tmp_path.glob("*.svg") if not p.stem.endswith("-cost")}
    assert figure.startswith("paper-tiny-s0.25-")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"paper.tex"} | {
        f"{figure}{kind}.{suffix}" for kind in ("", "-cost") for suffix in ("svg", "png", "pdf")
    }


def test_the_same_runs_make_the_same_figures(bench: Bench, runs: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert bench("report", runs, "--out", tmp_path / folder).code == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("format", "escaped"), [("md", r"a\|b_c%d&e"), ("latex", r"a\textbar{}b\_c\%d\&e")])
def test_names_from_a_file_are_escaped(bench: Bench, runs: Path, tmp_path: Path, format: str, escaped: str) -> None:
    run = next(runs.glob("tiny-none*"))
    info = json.loads((run / "run.json").read_text())
    info["identity"]["defense"]["name"] = "a|b_c%d&e"
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "run.json").write_text(json.dumps(info))
    (copy / "certificates.jsonl").write_text((run / "certificates.jsonl").read_text())
    assert escaped in bench("report", tmp_path, "--format", format).out


def test_published_rows_come_from_the_file_with_their_source() -> None:
    rows = published.facts()
    assert len(rows) > 100
    assert (rows != "").all().all()
    assert pd.to_numeric(rows["value"]).between(0, 100).all()
    assert set(rows["guarantee"]) == {"probabilistic at alpha", "deterministic"}
    assert set(rows["metric"]) == {"certified_accuracy", "clean_accuracy", "acr"}
    named = ["paper", "dataset", "method", "sigma", "metric", "radius"]
    assert not rows.duplicated(named).any()
    # At a larger radius never more is certified.
    accuracy = rows[rows["metric"] == "certified_accuracy"].assign(radius=lambda x: pd.to_numeric(x["radius"]))
    for _, part in accuracy.groupby(["paper", "dataset", "method", "sigma"]):
        assert pd.to_numeric(part.sort_values("radius")["value"]).is_monotonic_decreasing


def test_a_file_of_published_rows_without_the_newer_columns_is_read(tmp_path: Path) -> None:
    columns = published.facts().columns.drop(list(published.ADDED))
    published.facts()[columns].to_csv(tmp_path / "old.csv", index=False)
    old = published.facts(tmp_path / "old.csv")
    assert (old[columns] == published.facts()[columns]).all().all()
    assert (old[list(published.ADDED)] == "not stated").all().all()


def test_published_rows_are_below_a_table_and_say_what_differs(bench: Bench, runs: Path, tmp_path: Path) -> None:
    for run in runs.iterdir():
        info = json.loads((run / "run.json").read_text())
        info["identity"]["dataset"] = "cifar10"
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "run.json").write_text(json.dumps(info))
        (tmp_path / run.name / "certificates.jsonl").write_text((run / "certificates.jsonl").read_text())
    result = bench("report", tmp_path, "--published")
    assert result.code == 0
    row = next(line for line in result.out.splitlines() if "Cohen 2019" in line)
    facts = published.facts()
    facts = facts[(facts["arxiv"] == "1902.02918") & (facts["dataset"] == "cifar10") & (facts["sigma"] == "0.25")]
    assert f"{facts[facts['radius'] == '0.25']['value'].item()}%" in row
    assert "its own base; 500 images; n 100000" in row
    assert row.startswith("| *")
    # Our rows come first, and machine-readable tables hold nothing published.
    assert result.out.index("| none") < result.out.index("Cohen 2019")
    assert "Cohen" not in bench("report", runs, "--published").out  # nothing published for this data set
    refused = bench("report", runs, "--published", "--format", "csv")
    assert refused.code == 2 and refused.err.count("\n") == 1


def test_published_rows_below_an_imported_log(bench: Bench, tmp_path: Path) -> None:
    """An imported log has no base to compare with."""
    log = tmp_path / "log.tsv"
    rows = ["idx\tlabel\tpredict\tradius\tcorrect\ttime", *(f"{i}\t{i}\t{i}\t0.1\t1\t0:00:01" for i in range(5))]
    log.write_text("\n".join(rows))
    flags = ("--dataset", "cifar10", "--sigma", ".25", "--alpha", ".001", "--n", "1000", "--out", tmp_path / "runs")
    bench("import", log, *flags)
    result = bench("report", tmp_path / "runs", "--published")
    assert result.code == 0 and "(ours: 5 images, n 1,000, alpha 0.001, base not stated)" in result.out


def test_rows_not_significantly_worse_than_the_best_are_marked(bench: Bench, tmp_path: Path) -> None:
    """Of 40 images the best certifies 30 at .25; one certifies 4 fewer (McNemar p = .125), one 10 fewer (p = .002)."""
    made_up(tmp_path, [0.3] * 30 + [0.1] * 10, name="best")
    made_up(tmp_path, [0.3] * 26 + [0.1] * 14, name="close")
    made_up(tmp_path, [0.3] * 20 + [0.1] * 20, name="far")
    result = bench("report", tmp_path)
    assert result.code == 0
    column = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in result.out.splitlines() if "|" in line}
    assert column["best"].startswith("75.0% =<br>")
    assert column["close"].startswith("65.0% =<br>")
    assert column["far"].startswith("50.0%<br>")
    assert "best certifies the most images (75.0%); not significantly different: close." in result.out
    assert "Holm's correction over all 3 pairs of rows; each column is corrected separately" in result.out


def test_holms_correction_counts_all_pairs_of_rows(bench: Bench, tmp_path: Path) -> None:
    """7 fewer is p = .016: significant for two rows, not for the ten pairs of five."""
    made_up(tmp_path, [0.3] * 30 + [0.1] * 10, name="best")
    made_up(tmp_path, [0.3] * 23 + [0.1] * 17, name="one")
    row = next(line for line in bench("report", tmp_path).out.splitlines() if line.startswith("| one"))
    assert "=" not in row.split("|")[3]
    for name in ("two", "three", "four"):
        made_up(tmp_path, [0.3] * 29 + [0.1] * 11, name=name)
    row = next(line for line in bench("report", tmp_path).out.splitlines() if line.startswith("| one"))
    assert "=" in row.split("|")[3]


def test_a_reach_is_printed_rounded_up(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.3] * 10)
    reach = grouping.reach(read_run(run))
    (printed,) = re.findall(r"certified beyond r = ([\d.]+) ", bench("report", tmp_path).out)
    assert reach <= float(printed) < reach + 0.001


@pytest.mark.parametrize("format", ["md", "latex", "html"])
def test_a_table_of_validation_images_is_labelled(bench: Bench, tmp_path: Path, format: str) -> None:
    """With two rows, where the sentence on the best row follows."""
    for name, held in (("one", 8), ("two", 3)):
        made_up(tmp_path / "runs", [0.3] * held + [0.1] * (10 - held), name=name, split="validation")
    file = tmp_path / f"report.{'tex' if format == 'latex' else format}"
    assert bench("report", tmp_path / "runs", "--format", format, "--out", file).code == 0
    text = file.read_text()
    assert "These are validation images, for choosing settings: not a result. At r = 0.25 one certifies" in text
