"""A row's name says what the method is; how it was trained is in the note where all rows of the defense share it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.interface import Schedule
from bench.records import grouping
from bench.report import tables
from tests.helpers.records import made_up


def named(out: Path, *methods: tuple[str, dict[str, Any], list[str]]) -> tables.Table:
    """Make a table of runs with these defenses, settings and searched settings, the first the best."""
    for place, (defense, settings, searched) in enumerate(methods):
        config = settings | {"place": place}
        run = made_up(
            out, [0.3] * (20 - place) + [None] * place, name=defense, defense=identity(defense, config, searched)
        )
        info = json.loads((run / "run.json").read_text())
        info["defense"]["settings"] = settings
        info["defense"]["search"] = [
            {"values": dict.fromkeys(searched, "1"), "config": {}, "accuracy_under_noise": 0.5} for _ in searched[:1]
        ]
        (run / "run.json").write_text(json.dumps(info))
    (table,) = tables.build(tables.load_records(out)[0]).tables
    return table


def identity(defense: str, config: dict[str, Any], searched: list[str]) -> dict[str, Any]:
    return {
        **{"name": defense, "source": "0" * 64, "config": config | dict.fromkeys(searched, 1.0)},
        **{"weights": None, "parts": {}, "objective": None},
    }


def test_the_settings_of_training_are_those_of_the_schedule() -> None:
    assert {one.name for one in fields(Schedule)} == grouping.TRAINING


def test_training_that_all_rows_of_a_defense_share_is_in_the_note(tmp_path: Path) -> None:
    table = named(
        tmp_path,
        ("full", {"epochs": 2.0}, ["lr"]),
        ("lora", {"epochs": 2.0, "rank": 4}, ["lr"]),
        ("lora", {"epochs": 2.0, "rank": 8}, ["lr"]),
        ("retrain", {"batch": 64}, []),
        ("none", {"clip": True}, []),
    )
    assert [m.label for m in table.methods] == ["full", "lora rank=4", "lora rank=8", "retrain", "none clip"]
    trained = "full, lora rank=4, lora rank=8: epochs=2.0, lr searched; retrain: batch=64"
    assert f"Trained with {trained}; all else by the preset." in table.notes
    # Data keep the whole name.
    assert [m.row.defense for m in table.methods][:2] == [
        "full epochs=2.0, lr searched",
        "lora epochs=2.0 rank=4, lr searched",
    ]


def test_training_in_which_rows_of_a_defense_differ_stays_in_the_name(tmp_path: Path) -> None:
    table = named(
        tmp_path,
        ("lora", {"epochs": 2.0, "lr": 0.1}, []),
        ("lora", {"epochs": 4.0, "lr": 0.1}, []),
        ("lora", {"epochs": 4.0}, ["lr"]),
        ("full", {"lr": 0.1}, []),
    )
    assert [m.label for m in table.methods] == [
        *("lora epochs=2.0 lr=0.1", "lora epochs=4.0 lr=0.1", "lora epochs=4.0, lr searched", "full")
    ]
