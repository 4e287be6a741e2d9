"""A new head and a PEFT method trained together under noise, on a base of another task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Access, Defense, Draw, Schedule
from bench.models.base import Classifier


class Joint(Defense):
    """Joint adaptation of Certified PEFTSmoothing (Fu and Wang 2024): one training teaches the task and the noise.

    ``method`` is any defense that adapts a copy of the base by plain training (``lora``, ``full``);
    its preset sets places, sizes and schedule, which for the head is the same. The paper does not
    state its schedule for joint training, so ``paper`` is the method's own.
    """

    adapts = True
    family = "adaptation"
    trains = "classifier-tuned"
    paper = "2404.05350"

    @dataclass(frozen=True)
    class Config:
        """The defense whose adapters are trained with the head."""

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
                raise BenchError(f"this base's head is a {type(head).__name__}, no single layer; give another --base")
            # A base of another task may by chance have as many classes, and then kept its own head.
            head.reset_parameters()
            head.requires_grad_(True)

    def schedule(self) -> Schedule:
        return self.inner.schedule()

    def merge(self) -> None:
        self.inner.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.inner.logits(x, draw)
