"""Low-rank adapters on the base's layers, trained under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import peft
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Defense, Draw, Schedule


class LoRA(Defense):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) as used by Certified PEFTSmoothing (Fu and Wang 2024).

    The base stays frozen, its head included; peft's adapters learn to see through the noise and are
    merged before certification, so a vote costs what the base's costs. ``paper`` puts them on the
    attention's query, key and value projections, which timm fuses into one layer.
    """

    family = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Rank, scale and place of the adapters, and the training schedule."""

        rank: int = 8
        lora_alpha: float = 16
        targets: Literal["linear", "attention"] = "linear"
        epochs: float = 20
        batch: int = 64
        lr: float = 4e-3
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {
        "paper": {
            "targets": "attention",
            "epochs": 100,
            "batch": 128,
            "optimizer": "sgd",
            "lr": 0.05,
            "momentum": 0.9,
        }
    }

    def build(self) -> None:
        base = self.context.base.copy(self.context.classes)
        head = base.head()  # type: ignore[operator]
        kinds = (nn.Linear,) if self.config.targets == "attention" else (nn.Linear, nn.Conv2d)
        names = [n for n, m in base.named_modules() if isinstance(m, kinds) and m is not head]
        if self.config.targets == "attention":
            names = [n for n in names if n.endswith(".qkv")]
        if not names:
            raise BenchError(
                f"lora: targets={self.config.targets} matches no layer of this base; try --set targets=linear"
            )
        config = peft.LoraConfig(r=self.config.rank, lora_alpha=self.config.lora_alpha, target_modules=names)
        self.model: Any = peft.get_peft_model(base, config)

    def merge(self) -> None:
        self.model = self.model.merge_and_unload()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
