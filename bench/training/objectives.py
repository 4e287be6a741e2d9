"""Training objectives: losses of a classifier under noise.

Each takes (logits, clean x, y, draw) and adds the noise itself, so every trained defense can use any of them
(``--objective``). Constants are the published ones, and depend on the training noise level where the paper says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.interface import Draw, Logits, Objective


def clean(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy without noise, by which base classifiers are trained."""
    return F.cross_entropy(logits(x, draw), y)


def gaussian(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on one noisy copy of each image (Cohen et al. 2019, arXiv 1902.02918)."""
    return F.cross_entropy(logits(_noisy(x, draw), draw), y)


def stability(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on the clean image plus KL(clean || noisy) (Li et al. 2019, arXiv 1809.03113).

    The weight 2 is from the comparison in Jeong and Shin 2020 (arXiv 2006.04062).
    """
    calm, shaken = logits(x, draw), logits(_noisy(x, draw), draw)
    return F.cross_entropy(calm, y) + 2.0 * _kl(calm.log_softmax(1), shaken.log_softmax(1)).mean()


def consistency(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on m = 2 noisy copies, regularised to agree (Jeong and Shin 2020, arXiv 2006.04062).

    Adds lambda * mean_i KL(p_bar || p_i) + eta * H(p_bar), eta = .5, lambda = 20 at sigma .25 and
    below, 10 above; p_bar is the mean of the copies' probabilities.
    """
    weight, eta = (20.0 if draw.sigma <= 0.25 else 10.0), 0.5
    copies = [logits(_noisy(x, draw), draw) for _ in range(2)]
    logs = [c.log_softmax(1) for c in copies]
    mean = torch.stack(logs).logsumexp(0) - torch.tensor(2.0).log().to(x.device)
    agree = torch.stack([_kl(mean, log) for log in logs]).mean()
    entropy = -(mean.exp() * mean).sum(1).mean()
    right = torch.stack([F.cross_entropy(c, y) for c in copies]).mean()
    return right + weight * agree + eta * entropy


def dign(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Return the cross-entropy on the clean image plus lambda * mean_k KL(p(x) || p(x + s eps_k)) (arXiv 2104.01231).

    lambda = .2 and K = 3 as released; s is uniform on (0, sigma) for each image and copy, where sigma is the training
    noise level.
    """
    calm = logits(x, draw)
    log = calm.log_softmax(1)
    parts = []
    for _ in range(3):
        share = torch.special.ndtr(draw.normal(1, 1, 1))  # uniform on (0, 1), one for each image
        parts.append(_kl(log, logits(x + share * draw.sigma * draw.normal(*x.shape[1:]), draw).log_softmax(1)).mean())
    return F.cross_entropy(calm, y) + 0.2 * torch.stack(parts).mean()


OBJECTIVES: dict[str, Objective] = {
    "gaussian": gaussian,
    "stability": stability,
    "consistency": consistency,
    "dign": dign,
}
# Raise an objective's version whenever weights trained with it would change: it is part of their identity.
VERSIONS = {"clean": 1, "gaussian": 1, "stability": 1, "consistency": 1, "dign": 1}


def _noisy(x: Tensor, draw: Draw) -> Tensor:
    return x + draw.sigma * draw.normal(*x.shape[1:])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of each row, from log-probabilities."""
    return (p.exp() * (p - q)).sum(1)
