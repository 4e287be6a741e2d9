"""Fine-tune every weight of the base under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.interface import Defense, Draw, Schedule


class FullFineTuning(Defense):
    """Full fine-tuning, the comparator of Certified PEFTSmoothing (Fu and Wang 2024).

    That paper does not state its schedule; ``paper`` uses that of the prompt tuning it builds on
    (Jia et al. 2022, arXiv 2203.12119): SGD, cosine over 100 epochs with 10 of warm-up, batch 128.
    """

    family = "fine-tuning"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Training schedule."""

        epochs: float = 20
        batch: int = 64
        lr: float = 1e-3
        warmup: float = 0.1

    presets: ClassVar = {
        "paper": {
            "epochs": 100,
            "batch": 128,
            "optimizer": "sgd",
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 1e-4,
        }
    }

    def build(self) -> None:
        self.model = self.context.base.copy(self.context.classes)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
