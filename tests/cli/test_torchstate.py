"""A plug-in's changes to torch's process-wide settings are reverted and reported, and do not affect other rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import globalstate
from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]
CHANGES = {
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "gradient mode": "torch.set_grad_enabled(False)",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "number of threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "precision of float32 products": "torch.set_float32_matmul_precision('medium')",
    "cudnn flags": "torch.backends.cudnn.benchmark = True",
    "mkldnn flags": "torch.backends.mkldnn.enabled = False",
    "attention kernels": "torch.backends.cuda.enable_flash_sdp(False)",
    "autocast": "torch.set_autocast_enabled('cpu', True)",
    "flushing of denormal numbers": "torch.set_flush_denormal(True)",
    "hooks of all modules": "torch.nn.modules.module.register_module_forward_hook(lambda *_: None)",
}
PLUGIN = """
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from bench.interface import Access, Defense, Draw, Job, Schedule

def change():
    {change}

{at_import}

class Careless(Defense):
    access = Access.QUERY

    @dataclass(frozen=True)
    class Config(Schedule):
        epochs: float = 0.1

    def build(self) -> None:
        {at_build}
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32, device="cpu"))

    def fit(self, job: Job) -> None:
        {at_fit}

    def merge(self) -> None:
        {at_merge}

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        {at_logits}
        return self.context.base(x) * self.scale
"""
PLACES = {
    "import": "when it was imported",
    "build": "while it is built",
    "fit": "in training",
    "merge": "in merge",
    "logits": "at its first block",
}


def plugin(file: Path, change: str, at: str) -> Path:
    calls = {f"at_{place}": "change()" if place == at else "pass" for place in PLACES}
    file.write_text(PLUGIN.format(change=change, **calls))
    return file


def rows(bench: Bench, out: Path, monkeypatch: pytest.MonkeyPatch, defenses: str) -> tuple[dict[str, Any], str]:
    """Run ``none`` after the other defenses with an empty cache; return its record and the output."""
    monkeypatch.setenv("CERTBENCH_CACHE", str(out / "cache"))
    ran = bench(
        "run", "--defense", defenses, "--dataset", TINY, "--examples", 2, "--n", 50, "--out", out / "runs", "--json"
    )
    assert ran.code == 0, ran.err
    return json.loads(ran.out)[-1], ran.err


@pytest.mark.parametrize("setting", CHANGES)
def test_every_changed_setting_is_reverted_and_named(
    setting: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = globalstate.torch_settings()
    with globalstate.restored_torch_settings(str(tmp_path), "here"):
        exec(CHANGES[setting], {"torch": torch})
        assert globalstate.torch_settings() != before
    assert globalstate.torch_settings() == before
    said = capfd.readouterr().err
    assert said.startswith(f"bench: defense {tmp_path} changed torch's {setting} here; restored")
    assert said.count("\n") == 1
    with globalstate.restored_torch_settings(str(tmp_path), "here"):  # reported once
        exec(CHANGES[setting], {"torch": torch})
    assert globalstate.torch_settings() == before and not capfd.readouterr().err


@pytest.mark.parametrize("place", PLACES)
def test_other_rows_are_unaffected_by_a_plugins_settings(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before = globalstate.torch_settings()
    alone, _ = rows(bench, tmp_path / "alone", monkeypatch, "none")
    mine = plugin(tmp_path / "mine.py", CHANGES["default dtype"], place)
    after, said = rows(bench, tmp_path / "after", monkeypatch, f"{mine},none")
    assert after["identity"]["base"]["sha256"] == alone["identity"]["base"]["sha256"]
    assert after["metrics"] == alone["metrics"] and after["fingerprint"] == alone["fingerprint"]
    assert f"defense {mine} changed torch's default dtype {PLACES[place]}" in said
    assert globalstate.torch_settings() == before


def test_a_shared_part_is_trained_under_the_default_settings(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    text = (
        "import torch\nfrom defenses.denoiser import Denoiser\n\n\nclass Mine(Denoiser):\n"
        "    def build(self) -> None:\n        torch.set_default_dtype(torch.float64)\n        super().build()\n"
    )
    (tmp_path / "mine.py").write_text(text)
    args = ("run", "--defense", f"{tmp_path / 'mine.py'},denoiser", "--dataset", TINY, "--examples", 1, "--n", 50)
    few = ("--set", "epochs=0.05", "--set", "objective=mse", "--set", "depth=2", "--set", "width=4")
    ran = bench(*args, *few, "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    one, two = (r["identity"]["defense"]["parts"] for r in json.loads(ran.out))
    assert one == two != {}


def test_the_settings_of_a_process_are_those_at_its_start() -> None:
    """The harness and the built-in defenses change no settings."""
    before = globalstate.torch_settings()
    with globalstate.using_torch_settings(before):
        nn.Linear(2, 2)(torch.zeros(1, 2))
    assert globalstate.torch_settings() == before
