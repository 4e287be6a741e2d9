"""Joint adaptation's counterpart: the base is adapted to the task on clean images, then made robust under noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bench.interface import Defense, Draw, Job, Schedule
from bench.training.objectives import clean


class TwoStage(Defense):
    """The two-stage way that Certified PEFTSmoothing (Fu and Wang 2024) sets against joint adaptation.

    The same parameters as ``joint`` (a new head and those of ``method``) are trained first on clean
    images, by cross-entropy, then under noise. Each stage has half the epochs of ``joint`` and a
    whole learning-rate curve of its own, so both defenses take the same number of steps (to within
    one, by rounding); the paper does not say how it shares them out.
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
        self.joint = self.context.inner("joint", method=self.config.method)

    def schedule(self) -> Schedule:
        """Both stages together."""
        return self.joint.schedule()

    def fit(self, job: Job) -> None:
        half = replace(self.schedule(), epochs=self.schedule().epochs / 2)
        job.at("clean", sigma=0.0).train(self, lambda x, y, draw: clean(self.logits, x, y, draw), half)
        job.train(self, lambda x, y, draw: self.loss(x, y, draw, job), half)

    def merge(self) -> None:
        self.joint.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.joint.logits(x, draw)
