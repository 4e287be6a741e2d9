"""Older schemas of run.json: read as today's, what they did not record None."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.records.migration import migrate
from bench.records.record import read_run
from bench.records.schema import SCHEMA, Cost, RunInfo
from bench.records.writer import RunFolder
from tests.helpers.records import begun, costs, made_up


def older(info: dict[str, Any], schema: int) -> dict[str, Any]:
    """Return a run.json as certbench wrote it at an older schema."""
    info["schema"] = schema
    info["defense"]["family"] = info["defense"].pop("trains")
    if schema == 1:
        info.pop("certificates_sha256", None)
        for key in ("settings", "search", "trained_elsewhere"):
            del info["defense"][key]
        for key in ("trained_here", "trained_elsewhere"):
            info.get("cost", {}).pop(key, None)
    return info


@pytest.mark.parametrize("schema", [1, 2])
def test_an_older_record_reads_as_todays(tmp_path: Path, schema: int) -> None:
    file = made_up(tmp_path, [0.25, None]) / "run.json"
    today = read_run(file.parent)
    file.write_text(json.dumps(older(json.loads(file.read_text()), schema)))
    record = read_run(file.parent)
    assert record.identity.sha256 == today.identity.sha256
    assert (record.info.version, record.info.defense.trains, record.info.defense.family) == (3, "classifier-tuned", "")
    assert record.info.certificates_sha256 == (None if schema == 1 else today.info.certificates_sha256)
    assert record.cost.trained_here == (record.cost.trainable_nominal if schema == 1 else today.cost.trained_here)


@pytest.mark.parametrize("schema", [1, 2])
def test_an_older_run_that_goes_on_is_migrated_once(tmp_path: Path, schema: int) -> None:
    run = RunFolder(tmp_path, "digits-lora-s0.25", begun(1))
    run.close()
    file = run.path / "run.json"
    file.write_text(json.dumps(older(json.loads(file.read_text()), schema)))
    run = RunFolder(tmp_path, "digits-lora-s0.25", begun(1))
    run.update(preset="paper")
    run.close()
    assert json.loads(file.read_text())["schema"] == SCHEMA
    assert read_run(run.path).info.defense.trains == "classifier-tuned"


@pytest.mark.parametrize("info", [None, [], {}, {"schema": "3"}, {"schema": True}, {"schema": 4}, {"schema": 1}])
def test_what_is_no_run_json_is_one_line(info: Any) -> None:
    with pytest.raises(BenchError) as e:
        migrate(info)
    assert "\n" not in str(e.value)


def test_todays_is_left_alone(tmp_path: Path) -> None:
    info = begun(1).replace(cost=Cost.of(costs(5))).as_json()
    assert migrate(info) == info and RunInfo.of(info).as_json() == info
