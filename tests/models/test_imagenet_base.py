"""A real checkpoint, pretrained on ImageNet and saved in timm's layout, as the base of defenses of real CIFAR-10."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import Result

Bench = Callable[..., Result]
ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("CERTBENCH_SHARED") or ROOT.parent / "shared")
BASE, CIFAR = SHARED / "data" / "bases" / "efficientnet-lite0", SHARED / "data" / "cifar10"
# Numbers small enough for one core: 224x224 inputs, and blocks of 64 votes that take seconds each.
SMALLER = {"validation = 5000": "validation = 100", "train_examples = 10000": "train_examples = 500"}
FEW = ("--examples", 10, "--n0", 16, "--n", 48, "--alpha", 0.05, "--sigma", 0.12)


@pytest.mark.slow
@pytest.mark.skipif(not (BASE.is_dir() and CIFAR.is_dir()), reason=f"no {BASE} or {CIFAR}; set CERTBENCH_SHARED")
def test_probe_none_and_lora_of_convolutions_on_cifar10(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("CERTBENCH_DATA", str(SHARED / "data"))
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "datasets" / "cifar10.toml").read_text()
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "cifar10.toml").write_text(text)
    args = ("run", "--defense", "none,lora", "--dataset", tmp_path / "cifar10.toml", "--base", BASE, *FEW)
    result = bench(*args, "--set", "lora.epochs=2", "--set", "lora.batch=32", "--out", tmp_path / "runs")
    assert result.code == 0, result.err
    print(result.err, result.out)  # with pytest -s
    first = next(line for line in result.err.splitlines() if line.startswith("base efficientnet-lite0: "))
    assert "32x32 images are resized to 224x224" in first
    assert "bicubic" in first and "mean 0.5, std 0.5 (from config.json)" in first
    runs: dict[str, Any] = {}
    for file in (tmp_path / "runs").glob("*/run.json"):
        record = json.loads(file.read_text())
        runs[record["identity"]["defense"]["name"]] = record
    none, lora = runs["none"], runs["lora"]
    for record in (none, lora):
        assert record["status"] == "complete"
        assert record["base"]["source"]["file"] == "model.safetensors"
        assert record["base"]["probed_from_classes"] == 1000
        # ImageNet's features of 500 images separate CIFAR-10; chance is 0.1, and 100 images give +-0.1.
        assert record["base"]["probe_validation_clean_accuracy"] > 0.6
    assert none["identity"]["base"]["sha256"] == lora["identity"]["base"]["sha256"]
    assert (none["cost"]["trained_here"], none["cost"]["trained_elsewhere"]) == (0, 0)
    # Pointwise convolutions are adapted; the depthwise ones between them are grouped, and reported.
    assert lora["cost"]["trained_here"] == lora["cost"]["trainable_updated"] > 100_000
    assert any("grouped Conv2d" in note for note in lora["defense"]["notes"])
    assert lora["cost"]["parameters"] == none["cost"]["parameters"]  # merged
