"""Fine-tune only the base's biases under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.interface import Defense, Draw, Schedule


class BitFit(Defense):
    """BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): all biases are trained, all other weights are frozen.

    This includes the biases of norm layers and of the head. The paper also trains the complete head of a new task; here
    the base already has one, and its weight stays frozen as in the other defenses of this family. The paper's schedules
    are for language models: ``paper`` is the setting in which visual prompt tuning (Jia et al. 2022, arXiv 2203.12119)
    compares with BitFit, as released: AdamW, cosine over 100 epochs with 5 of warm-up, batch 384. Its rates 1e-4, 5e-4,
    1e-3 and 5e-3 (times batch / 256) are searched by::

        bench run --defense bitfit --dataset cifar10 --preset paper --search lr=1.5e-4,7.5e-4,1.5e-3,7.5e-3

    It also searches weight decays, but its AdamW never decays biases.
    """

    family = "PEFT"
    trains = "classifier-tuned"
    paper = "2106.10199"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Training schedule."""

        epochs: float = 20
        batch: int = 64
        lr: float = 1e-1
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {"paper": {"epochs": 100, "batch": 384, "optimizer": "adamw", "lr": 1.5e-3, "warmup": 0.05}}

    def build(self) -> None:
        self.model = self.context.base.copy(self.context.classes)
        for name, parameter in self.model.named_parameters():
            # BEiT's attention has q_bias and v_bias besides the layers' own.
            parameter.requires_grad_(name.endswith("bias"))

    def train(self, mode: bool = True) -> BitFit:
        """Set the mode, with the base's statistics kept in batch norms: those of noisy images are not biases."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
