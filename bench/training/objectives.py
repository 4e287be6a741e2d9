"""Training objectives: losses of a classifier under noise.

Each takes (logits, clean x, y, draw) and adds the noise itself, so every trained defense can use any of them
(``--objective``). Constants are the published ones, and depend on the training noise level and on the card's shape
where the paper says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interface import Draw, Logits, Objective

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
    return F.cross_entropy(logits(_noisy(x, draw), draw), y)


def stability(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return CE(clean) + 2 * H(p(clean), p(noisy)), where H is the cross-entropy of two predictions.

    As in the code that Jeong and Shin 2020 (arXiv 2006.04062) released for their comparison with stability training
    (Li et al. 2019, arXiv 1809.03113, whose term is KL(clean || noisy)). Gradients flow through both predictions, so
    H = KL + the entropy of the clean one, and also makes clean predictions confident.
    """
    calm, shaken = logits(x, draw), logits(_noisy(x, draw), draw)
    return F.cross_entropy(calm, y) + STABILITY_WEIGHT * F.cross_entropy(shaken, calm.softmax(1))


def similar_dataset(shape: tuple[int, ...]) -> str:
    """Return the data set of ``CONSISTENCY`` that images of ``shape`` (channels, height, width) are most like."""
    channels, *sides = shape
    return "MNIST" if channels == 1 else "ImageNet" if max(sides) > 64 else "CIFAR-10"


def consistency_constants(shape: tuple[int, ...], sigma: float) -> tuple[float, float]:
    """Return lambda and eta of ``consistency``, which the paper tunes to the data set and the noise level.

    The card's shape decides: grey images take MNIST's, colour images with a side above 64 ImageNet's, all others
    CIFAR-10's. Noise levels between the published ones take the next higher one's.
    """
    return CONSISTENCY[similar_dataset(shape)][(sigma > 0.25) + (sigma > 0.5)]


def remark(name: str, shape: tuple[int, ...], sigma: float) -> str:
    """Return what a reader of the results must know about an objective's constants; empty for nothing."""
    if name != "consistency":
        return ""
    weight, eta = consistency_constants(shape, sigma)
    return f"consistency: lambda {weight:g} and eta {eta:g}, as published for {similar_dataset(shape)} at this noise"


def consistency(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on m = 2 noisy copies, regularised to agree (Jeong and Shin 2020, arXiv 2006.04062).

    Adds lambda * mean_i KL(p_bar || p_i) + eta * H(p_bar), where p_bar is the mean of the copies' probabilities, with
    lambda and eta of ``consistency_constants``. Both copies are one batch, as released: batch norms see them together.
    """
    weight, eta = consistency_constants(tuple(x.shape[1:]), draw.sigma)
    copies = _Copies(draw, CONSISTENCY_COPIES)
    out = logits(_noisy(x.repeat(CONSISTENCY_COPIES, 1, 1, 1), copies), copies)
    logs = out.log_softmax(1).chunk(CONSISTENCY_COPIES)
    mean = torch.stack(logs).logsumexp(0) - torch.tensor(float(CONSISTENCY_COPIES)).log().to(x.device)
    agree = torch.stack([_kl(mean, log) for log in logs]).mean()
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
        parts.append(_kl(log, logits(x + share * draw.sigma * draw.normal(*x.shape[1:]), draw).log_softmax(1)).mean())
    return F.cross_entropy(calm, y) + DIGN_WEIGHT * torch.stack(parts).mean()


OBJECTIVES: dict[str, Objective] = {
    "gaussian": gaussian,
    "stability": stability,
    "consistency": consistency,
    "dign": dign,
}
# Raise an objective's version whenever weights trained with it would change: it is part of their identity.
VERSIONS = {"clean": 1, "gaussian": 1, "stability": 2, "consistency": 2, "dign": 1}


class _Copies:
    """The randomness of several copies of a batch, joined into one; satisfies ``interface.Draw``."""

    def __init__(self, draw: Draw, count: int) -> None:
        self.sigma = draw.sigma
        self._draw, self._count = draw, count

    def normal(self, *shape: int) -> Tensor:
        return torch.cat([self._draw.normal(*shape) for _ in range(self._count)])


def _noisy(x: Tensor, draw: Draw) -> Tensor:
    return x + draw.sigma * draw.normal(*x.shape[1:])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of each row, from log-probabilities."""
    return (p.exp() * (p - q)).sum(1)
