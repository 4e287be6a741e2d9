"""The figure of cost: rows that differ in one number and in cost are joined, all others are points of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.report import figures, tables
from tests.helpers.records import made_up


def row(out: Path, name: str, flops: float | None, share: float, **config: Any) -> None:
    """Write a run that certifies this share of 20 images, whose settings are those that are not 0."""
    identity = {"source": "d" * 64, "weights": "e" * 64, "parts": {}, "objective": "gaussian"}
    path = made_up(
        out,
        [0.3 if i < 20 * share else None for i in range(20)],
        name=name,
        cost={"flops_per_vote": flops},
        defense={"name": name, "config": {"steps": 0, "classifier": "", "head": True, **config}, **identity},
    )
    info = json.loads((path / "run.json").read_text())
    info["defense"]["settings"] = {k: v for k, v in config.items() if v}
    (path / "run.json").write_text(json.dumps(info))


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The lines of the figure by their labels, and the words beside points."""
    for steps, flops, share in ((0, 1e7, 0.5), (2, 2e7, 0.6), (4, 4e7, 0.55)):
        row(tmp_path, "diffusion", flops, share, steps=steps)
    for steps, flops, share in ((4, 5e7, 0.9), (0, 2e7, 0.7)):
        row(tmp_path, "diffusion", flops, share, steps=steps, classifier="lora")
    row(tmp_path, "diffusion", 9e7, 0.4, steps=2, classifier="full")  # differs in more than a number
    for rank in (1, 4):
        row(tmp_path, "lora", 1e6, 0.3, rank=rank)  # of equal cost
    row(tmp_path, "served", None, 0.3, steps=0)
    row(tmp_path, "served", None, 0.3, steps=2)
    found: dict[str, Any] = {}

    def keep(figure: Any, *_: Any) -> None:
        (ax,) = figure.axes
        found["lines"] = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
        found["styles"] = {c.get_label(): c.lines[0].get_linestyle() for c in ax.containers}
        found["words"] = sorted((t.get_text(), *t.xy) for t in ax.texts)

    monkeypatch.setattr(figures, "_save", keep)
    (table,) = tables.build(tables.load_records(tmp_path)[0]).tables
    figures.tradeoff(table, tmp_path, "x")
    return found


def test_rows_of_several_steps_are_one_curve_with_its_numbers(drawn: dict[str, Any]) -> None:
    lines = drawn["lines"]
    np.testing.assert_allclose(lines["diffusion, steps 0, 2, 4"], [[10, 50], [20, 60], [40, 55]])
    np.testing.assert_allclose(lines["diffusion classifier=lora, steps 0, 4"], [[20, 70], [50, 90]])
    assert [word for word, *_ in drawn["words"]] == ["0", "0", "2", "4", "4"]
    places = [place for _, *place in drawn["words"]]
    np.testing.assert_allclose(places, [[10, 50], [20, 70], [20, 60], [40, 55], [50, 90]])
    assert all(drawn["styles"][k] != "None" for k in lines if "steps " in k)


def test_other_rows_stay_points(drawn: dict[str, Any]) -> None:
    lines = drawn["lines"]
    others = {k: v for k, v in lines.items() if "steps " not in k}
    assert sorted(map(len, others.values())) == [1] * 5
    assert {"diffusion steps=2 classifier=full", "lora rank=1", "lora rank=4"} <= set(others)
    assert all(drawn["styles"][k] == "None" for k in others)
