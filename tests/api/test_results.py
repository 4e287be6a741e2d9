"""bench.load: the numbers of the report and the records, as data frames, tables, figures and comparisons."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import bench
from bench.data.datasets import load_card, load_split
from bench.errors import NotComparable
from tests.helpers.commands import TINY, Bench
from tests.helpers.records import made_up


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up runs of two methods at one sigma, and of one at another."""
    out = tmp_path_factory.mktemp("runs")
    radii = [0.3, 0.2, None, 0.4, 0.0, 0.6, None, 0.26]
    made_up(out, radii, name="lora")
    made_up(out, [r and r / 2 for r in radii], name="none")
    made_up(out, radii, name="lora", sigma=0.5)
    return out


def test_one_row_a_run_has_the_numbers_of_csv_and_what_identifies_it(bench_command: Bench, runs: Path) -> None:
    frame: Any = bench.load(runs).to_pandas()
    csv = bench_command("report", runs, "--format", "csv")
    from io import StringIO

    expected: Any = pd.read_csv(StringIO(csv.out)).set_index("run")
    assert len(frame) == 3 and set(expected.columns) - {"table"} <= set(frame.columns)
    for name in expected.columns:
        for run in frame["run"]:
            ours, theirs = frame.set_index("run").at[run, name], expected.at[run, name]
            assert ours == pytest.approx(theirs) or (pd.isna(theirs) and (pd.isna(ours) or ours == "")), name
    assert frame["sigma"].tolist() == [0.25, 0.25, 0.5] and frame["table"].tolist() == [0, 0, 1]
    record = json.loads((Path(frame["path"][0]) / "run.json").read_text())
    for name in ("n", "n0", "alpha"):
        assert frame[name][0] == record["identity"]["procedure"][name]
    certified = [c for c in frame if c.startswith("certified_") and c.count("_") == 1]
    radii = [float(c.removeprefix("certified_")) for c in certified]
    assert radii == sorted(radii) and len(radii) > 2


def test_certificates_are_one_row_an_image_of_each_run(runs: Path) -> None:
    results = bench.load(runs)
    frame: Any = results.certificates()
    assert len(frame) == 24 and frame["run"].nunique() == 3
    for record in results:
        part = frame[frame["run"] == record.path.name].reset_index()
        for i, c in enumerate(record.counted):
            for name, value in vars(c).items():
                assert (pd.isna(part.at[i, name]) and value is None) or part.at[i, name] == value, name
    assert frame["predicted"].isna().any() and str(frame["predicted"].dtype) == "Int64"
    # A share computed from the rows is the report's.
    first: Any = results.to_pandas().iloc[0]
    rows = frame[frame["run"] == first["run"]]
    share = ((rows["predicted"] == rows["label"]) & (rows["radius"] >= 0.25)).fillna(False).mean()
    assert share == pytest.approx(first["certified_0.25"])


def test_an_imported_log_has_no_counts(tmp_path: Path, bench_command: Bench) -> None:
    log = tmp_path / "log.tsv"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.5\t1\t0:00:01\n1\t1\t-1\t0.0\t0\t0:00:01\n")
    numbers = ("--sigma", 0.25, "--alpha", 0.001, "--n", 1000)
    bench_command("import", log, "--dataset", "other", *numbers, "--out", tmp_path / "runs")
    frame: Any = bench.load(tmp_path / "runs").certificates()
    assert frame["radius"].tolist() == [0.5, 0.0] and frame["predicted"].isna().tolist() == [False, True]
    assert frame["top_count"].isna().all() and frame["p_lower"].isna().all()


def test_the_table_is_the_reports_and_a_notebook_shows_it_escaped(bench_command: Bench, tmp_path: Path) -> None:
    made_up(tmp_path, [0.3, 0.2, None], name="lora")
    identity = {"source": "d" * 64, "config": {}, "weights": "e" * 64, "parts": {}, "objective": "gaussian"}
    evil = {"name": "<script>alert(1)</script>", **identity}
    made_up(tmp_path, [0.3, None, None], name="evil", defense=evil)
    results = bench.load(tmp_path)
    assert results.table() == bench_command("report", tmp_path, "--format", "md").out
    assert results.table(every=True) == bench_command("report", tmp_path, "--columns", "all").out
    html = results._repr_html_()
    assert "<script" not in html and "alert(1)" in html and html.count("<tr>") == 3
    assert "66.7%" in html and results._report.tables[0].setting.heading in unescape(html)


def test_a_figure_has_a_step_curve_for_each_method(runs: Path) -> None:
    mpl.use("Agg")
    results = bench.load(runs)
    with pytest.raises(bench.BenchError, match=r"runs of 2 tables cannot share a figure; choose one, plot\(table=0\)"):
        results.plot()
    with pytest.raises(bench.BenchError, match="no table 2; there are 2"):
        results.plot(2)
    ax: Any = results.plot(0)
    assert sorted(line.get_label() for line in ax.lines) == ["lora", "none"]
    assert {line.get_drawstyle() for line in ax.lines} == {"steps-pre"}
    frame: Any = results.to_pandas().set_index("defense")
    (line,) = (one for one in ax.lines if one.get_label() == "none")
    assert line.get_ydata()[0] == pytest.approx(100 * frame.at["none", "certified_0"])
    assert results.plot(1, ax) is ax and len(ax.lines) == 3


def test_a_figure_shows_names_with_dollars_as_they_are(tmp_path: Path) -> None:
    made_up(tmp_path, [0.3, None], name="a$\\x$", dataset="b$\\frac$")
    ax: Any = bench.load(tmp_path).plot()
    ax.figure.draw_without_rendering()
    assert ax.get_title().startswith("b\\$\\frac\\$, sigma")  # as Matplotlib shows b$\frac$


def test_two_runs_are_compared_as_the_command_does(bench_command: Bench, runs: Path) -> None:
    results = bench.load(runs)
    a, b, other = (r.path for r in results)
    pair = [a, b] if results[0].identity.sigma == results[1].identity.sigma else [a, other]
    found = results.compare(pair[0].name, pair[1])
    command = bench_command("compare", *pair, "--json")
    assert json.loads(json.dumps(found.as_json())) == json.loads(command.out)
    assert str(found) == found._repr_markdown_() == bench_command("compare", *pair).out
    by_sigma = {r.identity.sigma: r for r in results}
    with pytest.raises(NotComparable, match="sigma is"):
        results.compare(by_sigma[0.25], by_sigma[0.5])
    for wrong, problem in ((7, "no run 7; there are 3"), ("x", "no run x among")):
        with pytest.raises(bench.BenchError, match=problem):
            results.compare(0, wrong)


def test_lists_records_and_single_runs_are_loaded_and_what_is_left_out_is_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = bench.load(str(runs))
    one = bench.load(every[0])
    assert [r.path for r in one] == [every[0].path] and len(one) == 1
    assert len(bench.load([every[1], every[0].path, runs])) == 3
    assert "lora" in repr(every)
    made_up(tmp_path, [0.3, 0.2], name="lora")
    (folder,) = tmp_path.iterdir()
    info = json.loads((folder / "run.json").read_text())
    for key in ("cost", "metrics", "certificates_sha256"):
        del info[key]
    (folder / "run.json").write_text(json.dumps({**info, "status": "started"}))
    capsys.readouterr()
    both = bench.load([runs, tmp_path])
    assert len(both) == 3 and len(both.left_out) == 1 and folder.name in both.left_out[0]
    assert "left out:" in capsys.readouterr().err
    with pytest.raises(bench.BenchError, match="no finished run in"):
        bench.load(tmp_path)
    for address in ("hub:owner", "https://example.org/runs"):
        with pytest.raises(bench.BenchError, match="hub:OWNER/NAME"):
            bench.load(address)


def test_a_runs_model_predicts_arrays_tensors_and_files_alike(tmp_path: Path) -> None:
    records = bench.run("retrain", TINY, out=tmp_path / "runs", n=200)
    model = bench.load(records[0]).model(n=100, alpha=0.01)
    x: Any = load_split(load_card(TINY), "test").integers([0])[0]
    found = model(x, seed=4)
    assert (found.n, found.n0, found.seed, found.picture) == (100, 20, 4, "picture 0")
    assert model(torch.from_numpy(x).float() / 16, seed=4) == model(x / 16, seed=4) == found
    assert found.top_count + found.runner_up_count <= 100
    assert found.predicted is None or found.name == model.card.classes[found.predicted]
    with pytest.raises(bench.BenchError, match="not on the card's grid"):
        model(np.full((1, 8, 8), 0.51))
    assert model(np.full((1, 8, 8), 0.51), fit="levels").fitted
    half = torch.from_numpy(x).bfloat16()
    for odd in (half, [[[0, 1], [2]]]):
        with pytest.raises(bench.BenchError, match="give an array of numbers"):
            model(odd)
    wrong: Any
    first: Any = np.int64(0)
    for wrong in (1.5, "4"):
        with pytest.raises(bench.BenchError, match=f"--seed {wrong}: must be a whole number"):
            model(x, seed=wrong)
    for wrong in ({"n": 1e3}, {"n0": 20.5}, {"n": "100"}, {"alpha": "0.01"}):
        with pytest.raises(bench.BenchError, match=r"^--(n|n0|alpha) \S+: must be a (whole )?number$"):
            bench.load(records[0]).model(first, **wrong)
    more = bench.run("none", TINY, out=tmp_path / "runs")
    with pytest.raises(bench.BenchError, match="2 runs; name one: model"):
        bench.load([*records, *more]).model()
