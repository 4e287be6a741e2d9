"""Runs that differ in the version of grid noise alone share a table, are compared and checked, and the output says so.

Both versions draw the same distribution with the same tau, and every test pairs images, never votes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.compare.baseline import update
from bench.compare.check import check
from bench.compare.pairs import compare
from bench.records.grouping import groups, methods
from bench.records.record import Record, read_run
from bench.report.tables import build
from bench.smoothing.gridnoise import KINDS
from tests.helpers.records import made_up

NEW, AES = KINDS
RADII = [0.3, 0.0, 0.5, None, 0.26] * 4


def noise(grid_version: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "grid", "version": 1, "tau": 1e-16, "grid_version": grid_version, "levels": 17} | changes


def run(out: Path, version: str, name: str = "lora", seed: int = 0, radii: list[float | None] = RADII) -> Record:
    return read_run(made_up(out, radii, name=name, noise=noise(version), seed=seed))


def test_they_share_a_table_that_says_so(tmp_path: Path) -> None:
    records = [run(tmp_path, AES), run(tmp_path, NEW, "head")]
    assert [len(group) for group in groups(records)] == [2]
    (table,) = build(records).tables
    assert f"Grid noise is of 2 versions ({AES}, {NEW}): their distribution is the same, but runs" in table.notes
    (table,) = build(records[:1]).tables
    assert "versions" not in table.notes


@pytest.mark.parametrize("change", [{"tau": 1e-9}, {"levels": 256}, {"version": 2}, {"kind": "float"}])
def test_any_other_difference_in_noise_keeps_them_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    other = read_run(made_up(tmp_path, RADII, name="head", noise=noise(AES, **change)))
    assert len(groups([run(tmp_path, AES), other])) == 2


def test_seeds_of_one_method_are_pooled_and_one_seed_drawn_twice_is_not(tmp_path: Path) -> None:
    old, new = run(tmp_path, AES), run(tmp_path, NEW)
    assert old.path != new.path  # another identity, so another folder: votes of the two are never in one record
    assert [len(rows) for rows in methods([old, run(tmp_path, NEW, seed=1)])] == [2]
    assert [len(rows) for rows in methods([old, new])] == [1, 1]
    (table,) = build([old, new]).tables
    assert sorted(m.label for m in table.methods) == sorted(f"lora seed 0 ({r.path.name[-8:]})" for r in (old, new))


def test_compare_lists_the_versions(tmp_path: Path) -> None:
    new = run(tmp_path, NEW).path
    found = compare([run(tmp_path, AES).path, new])
    assert found.differs == {"noise.grid_version": [AES, NEW]}
    assert [test.p for test in found.pairs[0].radii] == [1.0] * 3
    assert compare([new, run(tmp_path, NEW, seed=1).path]).differs.keys() == {"seed"}


def test_a_baseline_of_one_version_is_a_test_of_the_other_and_prefers_its_own(tmp_path: Path) -> None:
    old = run(tmp_path / "old", AES)
    update(tmp_path / "b.json", tmp_path / "old", None)
    new = run(tmp_path / "new", NEW, radii=[0.3, 0.0, 0.26, None, 0.26] * 4)
    (entry,) = check(tmp_path / "b.json", tmp_path / "new").entries
    assert entry.run == str(new.path)
    assert f"counts may differ: other noise ({NEW}, was {AES})" in entry.notes
    assert [test.lost for test in entry.radii] == [0, 0, 4]
    run(tmp_path / "old", NEW)  # a run of each version
    (entry,) = check(tmp_path / "b.json", tmp_path / "old").entries
    assert entry.run == str(old.path)
