"""Train a new head and a PEFT method together under noise, on a base of another task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Access, Defense, Draw, Schedule
from bench.models.base import Classifier


class Joint(Defense):
    """Joint adaptation of Certified PEFTSmoothing (Fu and Wang 2024): one training for both the task and the noise.

    ``method`` is any defense that adapts a copy of the base by plain training (``lora``, ``full``). Its preset sets the
    adapted layers, sizes and schedule; the head uses the same schedule. The paper does not state its schedule for joint
    training, so ``paper`` is that of the method.
    """

    adapts = True
    family = "adaptation"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config:
        """The defense whose adapters are trained together with the head."""

        method: str = "lora"

    def build(self) -> None:
        method = self.config.method
        self.inner = inner = self.context.inner(method)
        copies = [m for m in inner.modules() if isinstance(m, Classifier)]
        plain = type(inner).fit is Defense.fit and type(inner).loss is Defense.loss and not inner.adapts
        if len(copies) != 1 or not plain or inner.needs(inner.config) < Access.WEIGHTS:
            raise BenchError(
                f"method={method} does not adapt a copy of the base by plain training; try --set method=lora"
            )
        for head in copies[0].heads():
            if not isinstance(head, (nn.Linear, nn.Conv2d)):
                raise BenchError(f"this base's head is a {type(head).__name__}, not one layer; give another --base")
            # A base of another task with the same number of classes has kept its own head.
            head.reset_parameters()
            head.requires_grad_(True)

    def schedule(self) -> Schedule:
        return self.inner.schedule()

    def merge(self) -> None:
        self.inner.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.inner.logits(x, draw)
