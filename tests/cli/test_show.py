"""bench show: every setting with its defaults and meaning, a card's keys, a run in words; and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from bench import plugins
from bench.data.datasets import card_files, load_card
from bench.runs.settings import configured
from tests.helpers.commands import TESTS, TINY, Bench

RECORDS = TESTS.parent / "reports" / "digits-quick" / "runs"
OWN = '''
from dataclasses import dataclass
from bench.interface import Defense

class Own(Defense):
    """Scale the pixels.

    Not shown.
    """

    paper = "1234.56789"

    @dataclass(frozen=True)
    class Config:
        # The factor,
        # of all pixels.
        factor: float = 0.5
        other: int = 3  # unused

    def logits(self, x, draw):
        return self.context.base(x * self.config.factor)
'''


@pytest.mark.parametrize("name", plugins.names())
def test_all_settings_of_a_defense_have_the_defaults_of_each_preset(bench: Bench, name: str) -> None:
    shown = json.loads(bench("show", name, "--json").out)
    cls, card = plugins.load(name)[0], load_card("digits")
    assert shown["needs_of_the_base"] == cls.needs(configured(name, cls, "quick", card, {})).name.lower()
    rows = {row["setting"]: row for row in shown["settings"]}
    assert list(rows) == [f.name for f in fields(cls.Config)]
    for preset in card.presets:
        config = configured(name, cls, preset, card, {})
        for setting, row in rows.items():
            value = getattr(config, setting)
            assert row[preset] == (f"{value:g}" if isinstance(value, float) else '""' if value == "" else value)


def test_a_file_of_ones_own_is_described_by_its_comments(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    result = bench("show", tmp_path / "own.py")
    assert result.code == 0, result.err
    assert "what it is: Scale the pixels.\n" in result.out and "Not shown" not in result.out
    assert "paper: https://arxiv.org/abs/1234.56789" in result.out
    (factor,) = [line for line in result.out.splitlines() if line.startswith("factor ")]
    assert factor.split() == ["factor", "number", "0.5", "0.5", "0.5", "The", "factor,", "of", "all", "pixels."]
    assert "0 parameters trained here" in result.out


def test_the_cost_is_that_of_the_record(bench: Bench) -> None:
    (run,) = RECORDS.glob("digits-lora-*")
    cost = json.loads((run / "run.json").read_text())["cost"]
    stated = json.loads(bench("show", "lora", "--json").out)["cost"]
    assert f"{cost['trained_here']:,} parameters" in stated and f"{cost['flops_per_vote'] / 1e9:.4g} GFLOPs" in stated


@pytest.mark.parametrize("name", card_files())
def test_a_card_is_shown_with_its_presets_and_bases(bench: Bench, name: str) -> None:
    shown = json.loads(bench("show", name, "--json").out)
    card = load_card(name)
    assert [row["preset"] for row in shown["presets"]] == list(card.presets)
    assert [row["base"] for row in shown["bases"]] == list(card.bases)
    assert shown["classes"].startswith(f"{len(card.classes)}: {card.classes[0]}")


def test_a_run_is_shown_with_the_command_that_repeats_it(bench: Bench) -> None:
    (run,) = RECORDS.glob("digits-lora-*")
    result = bench("show", run)
    assert result.code == 0, result.err
    for line in ("status: complete", "method: lora", "again: bench run --defense lora --dataset digits --sigma 0.25"):
        assert f"\n{line}\n" in result.out
    assert "certificates.jsonl.gz" in result.out and "setting: digits, sigma 0.25, 100 test images" in result.out


@pytest.mark.parametrize("probed", [False, True])
def test_a_run_is_shown_with_the_place_of_its_weights(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: bool
) -> None:
    out = tmp_path / "runs"
    other = ("--base", "vit-0to4") if probed else ()
    assert bench("run", "--defense", "head", "--dataset", TINY, *other, "--out", out).code == 0
    (run,) = out.glob("tiny-head-*")
    shown = json.loads(bench("show", run, "--json").out)
    own, base = (Path(shown[key].partition(" in ")[2]) for key in ("weights", "base_weights"))
    assert own.is_file() and base.is_file() and own != base
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    shown = json.loads(bench("show", run, "--json").out)
    assert all(shown[key].endswith("..., not in this cache") for key in ("weights", "base_weights"))
    entry = shutil.copytree(base.parent, tmp_path / "damaged" / base.parent.name)
    (entry / base.name).write_bytes(b"damaged")
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "damaged"))
    refused = bench("show", run)
    assert refused.code == 2 and refused.err.count("\n") == 1 and base.name in refused.err


def test_an_unknown_name_is_answered_with_the_nearest(bench: Bench) -> None:
    result = bench("show", "lorra")
    assert result.code == 2 and result.err.count("\n") == 1 and "lora" in result.err


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(bench: Bench, flag: str) -> None:
    from importlib.metadata import version

    result = bench(flag)
    assert (result.code, result.out) == (0, f"certbench {version('certbench')}\n")


def test_the_short_flag_for_help(bench: Bench) -> None:
    assert bench("-h").out == bench("--help").out != ""
    assert bench("run", "-h").out == bench("run", "--help").out
