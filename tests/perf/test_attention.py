"""Attention over a small image's few tokens, fused against spelled out: the reason for ``FEW_PATCHES``."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from turns import paired

from bench.base_sources import blueprint
from bench.blueprints import FEW_PATCHES
from bench.cards import load_card


def test_attention_over_few_tokens(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds of a block of digits' base, fused over as it is built."""
    plain = blueprint(load_card("digits"), "vit").fresh(10).eval()
    assert plain.model.patch_embed.num_patches <= FEW_PATCHES  # type: ignore[union-attr]
    fused = copy.deepcopy(plain)
    changed = [layer for layer in fused.modules() if hasattr(layer, "fused_attn")]
    for layer in changed:
        layer.fused_attn = True  # type: ignore[assignment]
    x = torch.rand(256, 1, 8, 8)

    def forward(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            for _ in range(10):
                model(x)

    assert changed and torch.allclose(plain(x), fused(x), atol=1e-4)
    ratios = paired(lambda: forward(fused), lambda: forward(plain), 11)
    with capsys.disabled():
        print(f"\nfused / spelled out: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    benchmark.extra_info["ratio"] = statistics.median(ratios)
    benchmark.pedantic(lambda: forward(plain), rounds=3)
