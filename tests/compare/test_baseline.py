"""Baselines: entries are kept exactly, their hash included."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bench.compare.baseline import Baseline, read, write
from bench.compare.entries import Entry, entry_of
from bench.errors import BenchError
from bench.records.record import read_run
from tests.helpers.records import made_up

ROOT = Path(__file__).parents[2]


def test_this_repository_gates_what_its_makefile_runs() -> None:
    found = read(ROOT / "reports" / "baselines" / "digits.json")
    flags = re.search(r"^GATE := --defense (\S+) (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert flags
    typed = set(zip(*[iter(shlex.split(flags[2]))] * 2, strict=True))
    assert sorted(e.method.name for e in found.entries) == sorted(flags[1].split(","))
    for one in found.entries:
        words = shlex.split(one.command)[2:]
        assert typed <= set(zip(*[iter(words)] * 2, strict=True))
    assert not found.any_base


@pytest.mark.parametrize("file", ["reports/baselines/digits.json", "tests/cli/baseline.json"])
def test_a_baseline_is_written_as_it_was_read(tmp_path: Path, file: str) -> None:
    found = read(ROOT / file)
    write(tmp_path / "b.json", found)
    assert (tmp_path / "b.json").read_bytes() == (ROOT / file).read_bytes()
    stored = json.loads((ROOT / file).read_text())["runs"]
    assert [e.sha256 for e in found.entries] == [e["sha256"] for e in stored]


def test_an_entry_has_the_types_of_its_numbers(tmp_path: Path) -> None:
    entry = entry_of(read_run(made_up(tmp_path / "runs", [0.25, None], sigma=1, train_sigma=1)))
    write(tmp_path / "b.json", Baseline(any_base=False, entries=[entry]))
    (again,) = read(tmp_path / "b.json").entries
    assert again.sha256 == entry.sha256 and '"sigma": 1,' in (tmp_path / "b.json").read_text()
    assert [i.radius is None for i in again.images] == [False, True]


def test_an_entry_of_another_form_is_one_line(tmp_path: Path) -> None:
    fields = entry_of(read_run(made_up(tmp_path, [0.25]))).as_json()
    changes: list[dict[str, Any]] = [
        {"images": []},
        {"images": [[0, 0.5]]},
        {"cost": {}},
        {"radii": ["0"]},
        {"environment": {"x": 1}},
    ]
    for change in changes:
        with pytest.raises(BenchError, match=next(iter(change))):
            Entry.of(fields | change)
