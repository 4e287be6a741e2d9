"""Fine-tune every weight of the base under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.interface import Defense, Draw, Schedule


class FullFineTuning(Defense):
    r"""Full fine-tuning, the comparator of Certified PEFTSmoothing (Fu and Wang 2024).

    That paper does not state its schedule; ``paper`` is the fine-tuning setting of the prompt tuning it builds on
    (Jia et al. 2022, arXiv 2203.12119), as released: AdamW, cosine over 100 epochs with 5 of warm-up, batch 384. Its
    rates 1e-4, 5e-4, 1e-3 and 5e-3 (times batch / 256) and weight decays are searched by::

        bench run --defense full --dataset cifar10 --preset paper \
            --search lr=1.5e-4,7.5e-4,1.5e-3,7.5e-3 --search weight_decay=0,1e-4,1e-3,1e-2

    Without a search ``paper`` takes the lowest rate, and the weight decay 0.01 that the released AdamW uses whatever
    the searched value; the released code spares biases and norms, this one decays all weights.
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
            "batch": 384,
            "optimizer": "adamw",
            "lr": 1.5e-4,
            "weight_decay": 0.01,
            "warmup": 0.05,
        }
    }

    def build(self) -> None:
        self.model = self.context.base.copy(self.context.classes)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
