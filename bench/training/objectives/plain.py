"""Objectives without an attack: gaussian noise, stability, consistency, DiGN; and ``clean``, of base classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interface import Draw, Logits, StepDraw
from bench.training.objectives.method import (
    Copies,
    Cost,
    TrainingObjective,
    at_noise,
    kl,
    level,
    noisy,
    similar_dataset,
)

STABILITY_WEIGHT = 2.0
CONSISTENCY_COPIES = 2
# lambda and eta at sigma up to .25, up to .5, and above (released commands and logs; none for ImageNet at .25).
CONSISTENCY = {
    "MNIST": ((10.0, 0.5), (5.0, 0.5), (5.0, 0.5)),
    "CIFAR-10": ((20.0, 0.5), (10.0, 0.5), (10.0, 0.5)),
    "ImageNet": ((5.0, 0.5), (5.0, 0.5), (5.0, 0.1)),
}
DIGN_WEIGHT, DIGN_COPIES = 0.2, 3


def clean(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy without noise, by which base classifiers are trained."""
    return F.cross_entropy(logits(x, draw), y)


def gaussian(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on one noisy copy of each image (Cohen et al. 2019, arXiv 1902.02918)."""
    return F.cross_entropy(logits(noisy(x, draw), draw), y)


def stability(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return CE(clean) + 2 * H(p(clean), p(noisy)), where H is the cross-entropy of two predictions.

    As in the code that Jeong and Shin 2020 (arXiv 2006.04062) released for their comparison with stability training
    (Li et al. 2019, arXiv 1809.03113, whose term is KL(clean || noisy)). Gradients flow through both predictions, so
    H = KL + the entropy of the clean one, and also makes clean predictions confident.
    """
    calm, shaken = logits(x, draw), logits(noisy(x, draw), draw)
    return F.cross_entropy(calm, y) + STABILITY_WEIGHT * F.cross_entropy(shaken, calm.softmax(1))


def consistency_constants(shape: tuple[int, ...], sigma: float) -> tuple[float, float]:
    """Return lambda and eta of ``consistency``, which the paper tunes to the data set and the noise level.

    The card's shape decides (``similar_dataset``). Noise levels between the published ones take the next higher one's.
    """
    return CONSISTENCY[similar_dataset(shape)][level(sigma)]


def consistency(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on m = 2 noisy copies, regularised to agree (Jeong and Shin 2020, arXiv 2006.04062).

    Adds lambda * mean_i KL(p_bar || p_i) + eta * H(p_bar), where p_bar is the mean of the copies' probabilities, with
    lambda and eta of ``consistency_constants``. Both copies are one batch, as released: batch norms see them together.
    """
    weight, eta = consistency_constants(tuple(x.shape[1:]), draw.sigma)
    copies = Copies(draw, CONSISTENCY_COPIES)
    out = logits(noisy(x.repeat(CONSISTENCY_COPIES, 1, 1, 1), copies), copies)
    logs = out.log_softmax(1).chunk(CONSISTENCY_COPIES)
    mean = torch.stack(logs).logsumexp(0) - torch.tensor(float(CONSISTENCY_COPIES)).log().to(x.device)
    agree = torch.stack([kl(mean, log) for log in logs]).mean()
    entropy = -(mean.exp() * mean).sum(1).mean()
    return F.cross_entropy(out, y.repeat(CONSISTENCY_COPIES)) + weight * agree + eta * entropy


def dign(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on the clean image plus lambda * mean_k KL(p(x) || p(x + s eps_k)) (arXiv 2104.01231).

    lambda = .2 and K = 3 as released; s is uniform on (0, sigma) for each image and copy, where sigma is the training
    noise level. As everywhere in certbench, sigma is in pixels of [0, 1]. The released code adds the noise to
    normalised images; its levels .2, .6 and 1.2, times a standard deviation of about .2, are ``--train-sigma .04``,
    ``.12`` and ``.24`` here.
    """
    calm = logits(x, draw)
    log = calm.log_softmax(1)
    parts = []
    for _ in range(DIGN_COPIES):
        share = torch.special.ndtr(draw.normal(1, 1, 1))  # uniform on (0, 1), one for each image
        parts.append(kl(log, logits(x + share * draw.sigma * draw.normal(*x.shape[1:]), draw).log_softmax(1)).mean())
    return F.cross_entropy(calm, y) + DIGN_WEIGHT * torch.stack(parts).mean()


@dataclass(frozen=True)
class Plain(TrainingObjective):
    """One of this file's functions, whose constants its version stands for."""

    function: Callable[[Logits, Tensor, Tensor, Draw], Tensor]
    copies: int  # of an image, in a step

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        return self.function(logits, x, y, draw)

    @property
    def cost(self) -> Cost:
        return Cost(self.copies, self.copies)

    def constants(self) -> dict[str, Any]:
        return {}


def make_consistency(shape: tuple[int, ...], sigma: float, quick: bool) -> Plain:
    """Return ``consistency`` and a remark on its constants."""
    weight, eta = consistency_constants(shape, sigma)
    dataset, place = similar_dataset(shape), level(sigma)
    if dataset == "ImageNet":
        place = max(place, 1)  # none are published for sigma .25
    said = f"consistency: lambda {weight:g} and eta {eta:g}, as published for {dataset} {at_noise(sigma, place)}"
    return Plain(consistency, CONSISTENCY_COPIES, remark=said)
