"""Curves are steps, never straight lines: between two radii they show no more than is certified there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.records import metrics
from bench.records.record import Record
from bench.report import envelopes, figures, plots, tables
from bench.report.tables import Table
from bench.smoothing.anytime import Anytime
from bench.smoothing.procedures import describe
from tests.helpers.records import made_up

ANYTIME = describe(Anytime(100, 1000, 0.001, (0.25, 0.5)))
FIXED = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "selected"}
EVERYWHERE = np.linspace(0, 0.61, 977)


@pytest.fixture(params=["fixed", "anytime"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    """Two methods, one of them with two seeds."""
    rng = np.random.default_rng(5)
    procedure, most = (FIXED, 0.6) if request.param == "fixed" else (ANYTIME, 0.5)
    for name, seed in (("one", 0), ("one", 1), ("other", 0)):
        made_up(tmp_path, rng.uniform(0, most, 30).tolist(), name=name, seed=seed, procedure=procedure)
    (found,) = tables.build(tables.load_records(tmp_path)[0]).tables
    return found


def truth(runs: Sequence[Record], radii: Sequence[float]) -> np.ndarray:
    """Certified accuracy in percent at any radii, counted image by image."""
    held = [[metrics.earned(r.certificates) >= radius for radius in radii] for r in runs]
    found: np.ndarray = 100 * np.mean(held, axis=(0, 2))
    return found


def drawn(x: Sequence[float], y: Sequence[float], at: Sequence[float]) -> np.ndarray:
    """Return what a step line shows at the radii: between two points the second one's value."""
    return np.array([y[bisect_left(x, r)] for r in at])


def inside(radii: Any, x: Any) -> list[float]:
    return [r for r in radii if r <= x[-1]]


def level_or_upright(x: Sequence[float], y: Sequence[float]) -> Iterator[bool]:
    """Whether each segment of a polygon is level or upright."""
    for i in range(1, len(x)):
        yield x[i] == x[i - 1] or y[i] == y[i - 1]


def test_a_line_of_the_page_is_never_above_what_is_certified(table: Table) -> None:
    figure = plots.curves([table], {m.label: i for i, m in enumerate(table.methods)})
    bands, lines = figure.data[::2], figure.data[1::2]
    for method, band, line in zip(table.methods, bands, lines, strict=True):
        assert line.line.shape == "vh"  # from a radius down, then level: the larger radius's value
        radii = inside(EVERYWHERE, line.x)
        assert (drawn(line.x, line.y, radii) <= truth(method.records, radii) + 1e-9).all()
        assert list(line.y) == pytest.approx(truth(method.records, line.x).tolist())
        assert line.x[-1] <= table.setting.reach
        corners = len(band.x) // 2
        assert all(level_or_upright(band.x[:corners], band.y[:corners]))
        assert all(level_or_upright(band.x[corners:], band.y[corners:]))
        upper = {x: min(y for u, y in zip(band.x[:corners], band.y[:corners], strict=True) if u == x) for x in line.x}
        assert all(upper[x] == pytest.approx(c[1]) for x, c in zip(line.x[1:-1], line.customdata[2:], strict=True))
    if table.setting.grid_only:
        assert all(list(line.x) == [0, 0.25, 0.5] for line in lines)


def test_a_line_of_a_figure_is_never_above_what_is_certified(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    kept: dict[str, Any] = {}
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.update(figure=self), save(self, *a, **k))[1])
    figures.curves(table, tmp_path, "figure")
    (axes,) = kept["figure"].axes
    runs = [m.records for m in table.methods]
    assert len(axes.lines) == len(axes.collections) == len(runs) == 2
    for seeds, line, band in zip(runs, axes.lines, axes.collections, strict=True):
        assert line.get_drawstyle() == "steps-pre"  # each value holds from the radius before up to its own
        x, y = line.get_data()
        radii = inside(EVERYWHERE, x)
        assert (drawn(x, y, radii) <= truth(seeds, radii) + 1e-9).all()
        corners = band.get_paths()[0].vertices
        assert all(level_or_upright(corners[:, 0], corners[:, 1]))


def test_a_best_sigma_curve_is_drawn_in_steps(tmp_path: Path) -> None:
    for split in ("test", "validation"):
        for sigma in (0.25, 0.5):
            of_split: dict[str, Any] = {"split": split, "images": split, "sigma": sigma, "train_sigma": sigma}
            made_up(tmp_path, [0.1, 0.3, 0.55, 0.6], **of_split)
    (found,) = envelopes.find(tables.load_records(tmp_path)[0])
    figure = plots.best_sigma(found.curves, {curve.label: i for i, curve in enumerate(found.curves)})
    assert [trace.line.shape for trace in figure.data] == ["vh"]


def test_a_curve_of_one_radius_is_a_point(tmp_path: Path) -> None:
    """No image can be certified at .25 with so few votes: one point, at 0."""
    procedure = describe(Anytime(10, 20, 0.001, (0.25, 0.5)))
    made_up(tmp_path, [0.0, None], procedure=procedure)
    (table,) = tables.build(tables.load_records(tmp_path)[0]).tables
    (_, line) = plots.curves([table], {table.methods[0].label: 0}).data
    assert list(line.x) == [0] and "markers" in line.mode
    assert figures.curves(table, tmp_path, "figure")[0].exists()
