"""Adapt a base of another task on clean images, then train it under noise: the counterpart of joint adaptation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bench.interface import Defense, Draw, Job, Schedule
from bench.training.objectives import clean


class TwoStage(Defense):
    """The two-stage training that Certified PEFTSmoothing (Fu and Wang 2024) compares with joint adaptation.

    The same parameters as in ``joint`` (a new head and those of ``method``) are trained first on clean images by
    cross-entropy, then under noise. Each stage has half the epochs of ``joint`` and its own complete learning-rate
    schedule, so both defenses take the same number of steps (up to one, by rounding). The paper does not state how it
    divides the steps.
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
        self.joint = self.context.inner("joint", method=self.config.method)

    def schedule(self) -> Schedule:
        """Return the schedule of both stages together."""
        return self.joint.schedule()

    def fit(self, job: Job) -> None:
        half = replace(self.schedule(), epochs=self.schedule().epochs / 2)
        job.at("clean", sigma=0.0).train(self, lambda x, y, draw: clean(self.logits, x, y, draw), half)
        job.train(self, lambda x, y, draw: self.loss(x, y, draw, job), half)

    def merge(self) -> None:
        self.joint.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.joint.logits(x, draw)
