"""Training objectives: how a loss is made of a classifier under noise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bench.interface import Draw, Logits


def clean(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Cross-entropy without noise: how base classifiers are trained."""
    return F.cross_entropy(logits(x, draw), y)


def gaussian(logits: Logits, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Cross-entropy on one noisy copy of each image (Cohen et al. 2019, arXiv 1902.02918)."""
    return F.cross_entropy(logits(x + draw.sigma * draw.normal(*x.shape[1:]), draw), y)
