"""Decide what the smoothed classifier says of an attacked image, by votes that no other decision and no run has drawn.

A decision is that of a certificate at radius 0 (Cohen et al. 2019): n0 votes select a class, n further ones must show
that its probability is above 1/2, by the Clopper-Pearson bound at level alpha. So a decided class is wrong with a
chance of at most alpha, over the noise. The image must not depend on that noise: attacks draw theirs from other keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.errors import BenchError
from bench.models.arithmetic import deterministic
from bench.records.attacks import Result
from bench.runs.redraw import Rebuilt
from bench.smoothing.engine import certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.noise import IMAGES, Noise
from bench.smoothing.votes import Certificate

SPLIT = "attack"  # the split in the keys of the noise: no card's split has this name, so no run has this noise
SLOTS = 1024  # decisions on one image, each with keys of its own


@dataclass(frozen=True)
class Decided:
    """An image, the decision on it, and the slot of its keys."""

    slot: int
    image: NDArray[Any]
    result: Result


class Decider:
    """Draws fresh votes for images, in the run's blocks, arithmetic and kind of noise."""

    def __init__(self, rebuilt: Rebuilt, procedure: Fixed, seed: int) -> None:
        """``seed``: of the votes' noise; another seed gives independent decisions."""
        self._rebuilt, self._procedure, self._noise = rebuilt, procedure, Noise(seed, SPLIT)

    def decide(self, index: int, images: Mapping[int, NDArray[Any]]) -> dict[int, Certificate]:
        """Decide several images that come from the run's image ``index``, each under a slot below ``SLOTS``."""
        if max(images) >= SLOTS or (index + 1) * SLOTS > IMAGES:
            raise BenchError(f"image {index}: its number is too large for the keys of an attack's noise")
        plan, tau = self._rebuilt.run.plan, self._rebuilt.run.identity.noise.tau
        keyed = {index * SLOTS + slot: image for slot, image in images.items()}
        task = replace(
            self._rebuilt.run.fresh_task(self._noise),
            images=lambda keys: np.stack([keyed[k] for k in keys]),
            labels=lambda _: 0,  # Fixed selects the class, whatever the label
        )
        device = replace(self._rebuilt.certifier.device, task=task)
        with deterministic(), torch.inference_mode():
            found = list(certify([device], lambda label: self._procedure.certify(plan.sigma, label, tau), keyed))
        return {c.index - index * SLOTS: c for c in found}
