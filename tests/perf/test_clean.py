"""Clean training in bfloat16 on a CPU: attention as products and channels last, against one fused call."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.data.datasets import load_card
from bench.models import architectures  # registers vit_earlyconv with timm
from bench.smoothing.noise import Noise, TrainDraw
from bench.training import clean
from bench.training.clean import CleanSchedule
from tests.helpers.turns import paired

BATCH, STEPS = 128, 3


def test_a_step_in_bfloat16(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratio of seconds for the same steps of the CIFAR-10 base: autocast alone over clean training's."""
    import timm

    assert architectures
    card = load_card("cifar10")
    module = timm.create_model("vit_earlyconv", **card.bases["vit-cpu"].args).train()
    x, y = torch.rand(BATCH, *card.shape), torch.randint(0, len(card.classes), (BATCH,))
    draw = TrainDraw(Noise(0, "test"), 0, BATCH, 0.0, torch.device("cpu"))
    loss = clean.loss(module, CleanSchedule(arithmetic="bfloat16"), len(card.classes), card.mean)

    def ours() -> None:
        for _ in range(STEPS):
            loss(x, y, draw).backward()

    def autocast() -> None:
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                logits = module(x)
            F.cross_entropy(logits.float(), y).backward()

    ratios = paired(autocast, ours, 5)
    with capsys.disabled():
        print(f"\nautocast / clean training: median {statistics.median(ratios):.2f}, from {min(ratios):.2f}")
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    benchmark.pedantic(ours, rounds=1)
