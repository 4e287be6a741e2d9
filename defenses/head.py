"""Fine-tune only the base's last layer under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.errors import BenchError
from bench.interface import Defense, Draw, Schedule


class LinearHead(Defense):
    r"""Linear probing: the layer from features to logits is trained; the features stay the base's.

    Both heads of a distilled base are trained. This is the smallest change a white-box defense can make, and a
    comparator of visual prompt tuning (Jia et al. 2022); here it trains on noisy images and starts from the base's own
    head instead of a random one. ``paper`` is that paper's schedule, as released: SGD, cosine over 100 epochs with 10
    of warm-up, batch 1024. Its rates 0.05 to 50 (times batch / 256) and weight decays are searched by::

        bench run --defense head --dataset cifar10 --preset paper \
            --search lr=0.2,0.4,1,2,4,10,20,40,100,200 --search weight_decay=0,1e-4,1e-3,1e-2

    Without a search ``paper`` takes 0.25 times batch / 256.
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2203.12119"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Training schedule."""

        epochs: float = 20
        batch: int = 64
        lr: float = 3e-2
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {"paper": {"epochs": 100, "batch": 1024, "optimizer": "sgd", "lr": 1.0, "weight_decay": 1e-4}}

    def build(self) -> None:
        self.model = self.context.base.copy(self.context.classes).requires_grad_(False)
        for head in self.model.heads():  # type: ignore[operator]
            head.requires_grad_(True)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise BenchError("head: this base's head has no parameters to train; use full or lora")

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
