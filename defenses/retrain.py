"""Train the base's architecture from scratch under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.interface import Access, Defense, Draw, Schedule


class Retrain(Defense):
    """Gaussian data augmentation (Cohen et al. 2019): random weights, and new noise for each image at each step.

    The preset ``paper`` of a card chooses their network (``scratch_base``) and trains on all its training images.
    """

    access = Access.NONE
    family = "retraining"
    trains = "from scratch"
    paper = "1902.02918"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Training schedule; ``paper`` is that of the released commands, for CIFAR-10 and ImageNet.

        90 epochs, x0.1 every 30, batch 400 (the default of their train.py is 256).
        """

        epochs: float = 60
        batch: int = 64
        lr: float = 1e-3
        weight_decay: float = 0.05
        warmup: float = 0.1

    presets: ClassVar = {
        "paper": {
            "epochs": 90,
            "batch": 400,
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "decay": "step",
            "warmup": 0,
        }
    }

    def build(self) -> None:
        self.model = self.context.base.untrained(self.context.classes)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
