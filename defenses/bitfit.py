"""Fine-tune the base's biases alone under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.interface import Defense, Draw, Schedule


class BitFit(Defense):
    """BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): every bias is trained, every other weight is frozen.

    Norm layers' biases and the head's are among them. The paper also trains a new task's whole head;
    here the base has one already, and its weight stays frozen as in the other defenses of this family.
    Its schedules are for language models: ``paper`` has that of visual prompt tuning (Jia et al. 2022),
    which compares itself with it, and a rate from that paper's search.
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

    presets: ClassVar = {"paper": {"epochs": 100, "batch": 128, "optimizer": "sgd", "lr": 0.05}}

    def build(self) -> None:
        self.model = self.context.base.copy(self.context.classes)
        for name, parameter in self.model.named_parameters():
            # BEiT's attention has q_bias and v_bias beside the layers' own.
            parameter.requires_grad_(name.endswith("bias"))

    def train(self, mode: bool = True) -> BitFit:
        """Batch norms keep the base's statistics: learning those of noisy images is more than a bias."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.model(x)
        return out
