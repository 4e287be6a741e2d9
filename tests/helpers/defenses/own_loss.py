"""A defense with its own loss."""

from dataclasses import dataclass

from torch import Tensor

from bench.interface import Defense, Draw, Job, Schedule


class OwnLoss(Defense):
    @dataclass(frozen=True)
    class Config(Schedule):
        pass

    def build(self) -> None:
        self.model = self.context.base.copy()

    def loss(self, x: Tensor, y: Tensor, draw: Draw, job: Job) -> Tensor:
        return self.logits(x, draw).square().mean()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.model(x)
