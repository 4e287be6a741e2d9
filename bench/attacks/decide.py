"""Decide what the smoothed classifier says of an attacked image, by votes that no other decision and no run has drawn.

A decision is PREDICT of Cohen et al. 2019 (arXiv 1902.02918): of n votes, the class with the most is returned if the
two-sided binomial test of its votes against those of the runner-up rejects equality at level alpha, else none. So a
decided class is not the smoothed classifier's with a chance of at most alpha, over the noise (Hung and Fithian 2019,
arXiv 1610.03944). The image must not depend on that noise: attacks draw theirs from other keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from bench.errors import BenchError
from bench.models.arithmetic import deterministic
from bench.records.attacks import Result
from bench.runs.redraw import Rebuilt
from bench.smoothing import bounds
from bench.smoothing.engine import certify
from bench.smoothing.noise import IMAGES, Noise
from bench.smoothing.votes import Certificate, Counts, Decision, VoteRequest

SPLIT = "attack"  # the split in the keys of the noise: no card's split has this name, so no run has this noise
SLOTS = 1024  # decisions on one image, each with keys of its own


@dataclass(frozen=True)
class Predict:
    """The procedure PREDICT; satisfies ``votes.ImageProcedure``.

    ``tau``: the noise's total-variation error, by which each class's probability may be off. The null hypothesis allows
    for it: of the votes for two classes, the one that is no better gets at most 1/2 + tau * classes, since the better
    one has a probability of at least 1 / classes.
    """

    n: int
    alpha: float
    tau: float = 0.0

    def first(self) -> VoteRequest:
        return VoteRequest("estimate", self.n)

    def update(self, counts: Counts) -> Decision:
        """Return the decision; votes of NaN logits are a class after the last, which is never returned."""
        classes = len(counts) - 1
        top, second = (int(i) for i in np.argsort(-counts, kind="stable")[:2])
        both = int(counts[top] + counts[second])
        p = 2 * float(stats.binom.sf(int(counts[top]) - 1, both, min(1.0, 0.5 + self.tau * classes)))
        sure = p <= self.alpha * (1 - bounds.SLACK) and top < classes
        return Decision(
            predicted=top if sure else None,
            radius=0.0,
            n0=0,
            n=self.n,
            top_count=int(counts[top]),
            runner_up=second if counts[second] else None,
            runner_up_count=int(counts[second]),
            p_lower=0.0,
            votes=self.n,
        )


def smallest_n(alpha: float) -> int:
    """Return the fewest votes that can decide at level ``alpha``."""
    n = 1
    while 2 * 0.5**n > alpha * (1 - bounds.SLACK):
        n += 1
    return n


@dataclass(frozen=True)
class Decided:
    """An image, the decision on it, and the slot of its keys."""

    slot: int
    image: NDArray[Any]
    result: Result


class Decider:
    """Draws fresh votes for images, in the run's blocks, arithmetic and kind of noise."""

    def __init__(self, rebuilt: Rebuilt, procedure: Predict, seed: int) -> None:
        """``seed``: of the votes' noise; another seed gives independent decisions."""
        self._rebuilt, self._procedure, self._noise = rebuilt, procedure, Noise(seed, SPLIT)

    def decide(self, index: int, images: Mapping[int, NDArray[Any]]) -> dict[int, Certificate]:
        """Decide several images that come from the run's image ``index``, each under a slot below ``SLOTS``."""
        if max(images) >= SLOTS or (index + 1) * SLOTS > IMAGES:
            raise BenchError(f"image {index}: its number is too large for the keys of an attack's noise")
        keyed = {index * SLOTS + slot: image for slot, image in images.items()}
        task = replace(
            self._rebuilt.run.fresh_task(self._noise),
            images=lambda keys: np.stack([keyed[k] for k in keys]),
            labels=lambda _: 0,  # decides nothing
        )
        device = replace(self._rebuilt.certifier.device, task=task)
        with deterministic(), torch.inference_mode():
            found = list(certify([device], lambda _: self._procedure, keyed))
        return {c.index - index * SLOTS: c for c in found}
