"""Records of certbench 0.1.0, made by that version: they are read, reported and verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.io.files import digest
from bench.records.record import read_run
from tests.helpers.commands import TESTS, Bench

RECORDS = TESTS / "cli" / "golden" / "certbench-0.1.0"
NONE, HEAD = "digits-none-s0.25-f8d6293b", "digits-head-s0.25-083e5724"


@pytest.mark.parametrize("name", [NONE, HEAD])
def test_it_is_read_without_a_change(name: str) -> None:
    stored = json.loads((RECORDS / name / "run.json").read_text())
    record = read_run(RECORDS / name)
    assert record.info.environment.certbench == "0.1.0"
    assert record.info.as_json() == stored
    assert record.identity.sha256 == digest(stored["identity"]) and name.endswith(record.identity.folder_suffix)


def test_both_are_reported_in_one_table(bench: Bench) -> None:
    result = bench("report", RECORDS, "--format", "json")
    assert result.code == 0
    (table,) = json.loads(result.out)["tables"]
    assert {row["run"]: row["certified_0.25"] for row in table["rows"]} == {NONE: 0.2, HEAD: 0.35}


def test_an_unchanged_defense_is_drawn_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS.parent)  # its base is a file of the repository
    runs = shutil.copytree(RECORDS, tmp_path / "runs")
    verified = bench("verify", runs / NONE)
    assert verified.code == 0, verified.out
    assert "5 images drawn again from the seed give the recorded counts" in verified.out
    verified = bench("verify", runs / HEAD)
    assert verified.code == 0 and "not drawn again: its trained weights are not in this cache" in verified.out
