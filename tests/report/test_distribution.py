"""The figure of p_lower: every image of every run, and what each procedure's values mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.report import distribution, output, tables
from bench.report.tables import Table
from bench.smoothing import bounds
from bench.smoothing.anytime import Anytime
from bench.smoothing.procedures import describe
from tests.cli.test_html import read
from tests.helpers.records import made_up

TITLE = "Distribution of p_lower over the images"
ANYTIME = describe(Anytime(100, 1000, 0.001, (0.25, 0.5)))


def fixed(target: str = "selected") -> dict[str, object]:
    return {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": target}


def built(folder: Path) -> Table:
    (found,) = tables.build(tables.load_records(folder)[0]).tables
    return found


def test_the_page_has_each_runs_distribution_and_the_largest_value(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("one", 1), ("other", 0)):
        made_up(tmp_path / "runs", [0.3] * (10 + seed) + [0.1] * (8 - seed) + [None] * 2, name=name, seed=seed)
    table = built(tmp_path / "runs")
    (file,) = output.write(tables.build(tables.load_records(tmp_path / "runs")[0]), "html", tmp_path / "page.html")
    seen = read(file)
    keys = [a["data-plot"] for t, a in seen.tags if t == "figure" and a.get("data-plot")]
    text = file.read_text()
    (key,) = (k for k in keys if f'data-plot="{k}"><figcaption>{TITLE}' in text)
    top, *lines = seen.views[str(key)][""]["data"]
    largest = bounds.lower_bound(1000, 1000, 0.001)
    assert top["x"] == [largest, largest] and top["name"] == f"largest possible: {largest:.6f}"
    runs = {f"one, seed {r.identity.seed}" if m.row.seeds > 1 else m.label: r for m in table.methods for r in m.records}
    assert [line["name"] for line in lines] == list(runs) and len(runs) == 3
    for line in lines:
        values = np.array([c.p_lower for c in runs[line["name"]].counted])
        assert line["line"]["shape"] == "hv" and max(values) <= largest
        for x, y in list(zip(line["x"], line["y"], strict=True))[1:]:
            assert y == pytest.approx(100 * np.mean(values <= x))
        assert set(values) <= set(line["x"]) and (line["x"][-1], line["y"][-1]) == (1.0, 100.0)
    assert "no image can be to the right of it" in seen.text


def test_the_targets_and_procedures_are_told_what_their_values_mean(tmp_path: Path) -> None:
    radii = [0.3] * 6 + [0.1] * 3 + [None]
    for target, said in (
        ("selected", "the one that the votes selected, right or wrong"),
        ("label", "The class is the label, so p_lower is low"),
    ):
        made_up(tmp_path / target, radii, procedure=fixed(target))
        assert said in distribution.note(built(tmp_path / target))
    made_up(tmp_path / "correct", radii, wrong=[0, 1], procedure=fixed("correct"))
    table = built(tmp_path / "correct")
    assert "got no votes that bound it, and is drawn at 0" in distribution.note(table)
    line = distribution.p_lower(table.methods, {m.label: 0 for m in table.methods}).data[1]
    assert dict(zip(line.x[1:], line.y[1:], strict=True))[0.0] == pytest.approx(20)  # 2 of 10 stopped

    made_up(tmp_path / "anytime", radii, procedure=ANYTIME)
    table = built(tmp_path / "anytime")
    assert "not an estimate of the probability" in distribution.note(table)
    top, line = distribution.p_lower(table.methods, {m.label: 0 for m in table.methods}).data
    # No radius, Phi(.25 / .25) and Phi(.5 / .25): what the radii of the grid need.
    assert top.x[0] == pytest.approx(0.97725, abs=1e-5)
    assert list(line.x[1:-1]) == pytest.approx([0, 0.841345, 0.97725], abs=1e-5)
    assert list(line.y[1:-1]) == pytest.approx([10, 40, 100])


def test_a_line_of_many_values_has_few_points_each_exact() -> None:
    values = np.random.default_rng(0).random(100_000)
    x, share = distribution.ecdf(values)
    assert len(x) == distribution.POINTS
    assert share == pytest.approx(np.searchsorted(np.sort(values), x, "right") / len(values))
