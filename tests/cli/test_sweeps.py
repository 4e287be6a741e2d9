"""Test commands with several values of a setting, a search on the validation split, or several seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]


def infos(out: Path) -> list[dict[str, Any]]:
    return [json.loads(f.read_text()) for f in sorted(out.glob("*/run.json"))]


def test_each_value_of_a_list_makes_a_run(bench: Bench, tmp_path: Path) -> None:
    ran = bench(
        *("run", "--defense", "none,lora", "--dataset", TINY, "--out", tmp_path),
        *("--set", "rank=2,4", "--set", "lora.lora_alpha=16"),
    )
    assert ran.code == 0, ran.err
    assert sorted(i["identity"]["defense"]["config"].get("rank", 0) for i in infos(tmp_path)) == [0, 2, 4]
    # A default value is not part of the name.
    assert "| lora rank=2 " in ran.out and "| lora rank=4 " in ran.out and "lora_alpha" not in ran.out
    for info in infos(tmp_path):
        assert len(info["arguments"]["settings"]) == (0 if info["identity"]["defense"]["name"] == "none" else 2)
    runs = sorted(p.name for p in tmp_path.iterdir())
    again = bench(*("run", "--defense", "lora", "--dataset", TINY, "--out", tmp_path, "--set", "rank=4"))
    assert "already complete" in again.err
    assert sorted(p.name for p in tmp_path.iterdir()) == runs


def test_a_search_keeps_the_best_on_validation_and_records_all_candidates(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "lora", "--dataset", TINY, "--out", tmp_path, "--search", "lr=1e-9,4e-3")
    ran = bench(*args, "--set", "rank=4")
    assert ran.code == 0, ran.err
    (info,) = infos(tmp_path)
    tried = info["defense"]["search"]
    assert [t["values"] for t in tried] == [{"lr": "1e-9"}, {"lr": "4e-3"}]
    best = max(tried, key=lambda t: t["accuracy_under_noise"])
    assert info["identity"]["defense"]["config"] == best["config"]
    assert all(0 <= t["accuracy_under_noise"] <= 1 for t in tried)
    assert "| lora rank=4 " in ran.out and "Trained with lora rank=4: lr searched; all else by the preset." in ran.out
    (run,) = tmp_path.iterdir()
    verified = bench("verify", run)
    assert verified.code == 0, verified.out
    assert "exactly" in verified.out


def test_seeds_are_pooled_and_counted(bench: Bench, tmp_path: Path) -> None:
    ran = bench("run", "--defense", "none,lora", "--dataset", TINY, "--out", tmp_path, "--seed", "0,1,2")
    assert ran.code == 0, ran.err
    assert "| lora (3 seeds) " in ran.out
    (table,) = json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]
    assert len(table["rows"]) == 6
    values = [r["certified_0"] for r in table["rows"] if r["defense"] == "lora"]
    row = next(line for line in ran.out.splitlines() if line.startswith("| lora"))
    assert row.split("|")[2].strip().startswith(f"{sum(values) / 3:.1%}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--search", "lr"), "--search lr: write key=value"),
        (("--search", "speed=1,2"), "setting of lora"),
        (("--set", "lr=.1", "--search", "lr=.1,.2"), "leave one out"),
        (("--set", "rank=2,x"), "rank"),
        (("--search", "none.lr=1"), "defense in --search"),
        (("--search", "lr=.1,.2", "--weights", "w.safetensors"), "give only one of the two"),
    ],
)
def test_invalid_settings_are_one_line(bench: Bench, flags: tuple[str, ...], words: str) -> None:
    result = bench("run", "--defense", "lora", "--dataset", TINY, *flags)
    assert result.code == 2
    assert words in result.err and result.err.count("\n") == 1
