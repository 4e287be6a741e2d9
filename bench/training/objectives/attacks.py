"""Attacks on the soft smoothed classifier, whose probabilities are the mean over copies of an image with fixed noise.

They run in eval mode (``StepDraw.evaluating``), and differentiate by the image alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.errors import DefenseFault
from bench.interface import Logits, StepDraw
from bench.training.objectives.method import Copies, repeated, smoothed_loss

DDN_CHANGE = 0.05  # by which DDN's norm shrinks or grows, relative to it


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    """Return the gradient of ``loss`` with respect to ``at`` alone. Raises DefenseFault where there is none."""
    found = torch.autograd.grad(loss, at, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise DefenseFault(
            "no gradient of its loss reaches the image, which this --objective attacks; compute logits without "
            "torch.no_grad, or use --objective gaussian, consistency or macer"
        )
    return found


def norms(x: Tensor) -> Tensor:
    """Return the l2 norm of each row, [B, 1, 1, 1]."""
    found: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return found.view(-1, 1, 1, 1)


def within(delta: Tensor, radius: float) -> Tensor:
    """Project each row onto the l2 ball of ``radius``."""
    return delta.renorm(2, 0, radius)


def pgd(logits: Logits, x: Tensor, y: Tensor, noise: Tensor, draw: StepDraw, *, steps: int, epsilon: float) -> Tensor:
    """Attack by projected gradient descent (Salman et al. 2019, arXiv 1906.04584).

    Steps of length 2 epsilon / steps along the normalised gradient, from the image itself.

    Args:
        logits: The classifier.
        x: Clean pixels [B, C, H, W] in [0, 1].
        y: Labels [B], that the attack leads away from.
        noise: Noise of the copies, [copies * B, C, H, W].
        draw: The step's randomness.
        steps: Number of steps.
        epsilon: Radius of the l2 ball of perturbations.

    Returns:
        The perturbations [B, C, H, W]: in the ball, and x plus them in [0, 1].
    """
    delta = torch.zeros_like(x)
    for _ in range(steps):
        slope, _ = _slope(logits, x, y, noise, draw, delta)
        delta = delta + 2 * epsilon / steps * _direction(slope, draw)
        delta = within((x + delta).clamp(0, 1) - x, epsilon)
    return delta


def ddn(logits: Logits, x: Tensor, y: Tensor, noise: Tensor, draw: StepDraw, *, steps: int, epsilon: float) -> Tensor:
    """Attack by decoupled direction and norm (Rony et al. 2019, arXiv 1811.09600), as in Salman et al. 2019.

    The norm, at first epsilon, shrinks by 5% after a step whose image most copies misclassify, and grows by 5% after
    the others. Returns the smallest perturbation that succeeded, projected to the ball; zeros where none did. Arguments
    as of ``pgd``.
    """
    copies = len(noise) // len(x)
    delta, best = torch.zeros_like(x), torch.zeros_like(x)
    largest = norms(torch.maximum(x, 1 - x))  # of a perturbation within [0, 1]
    norm, smallest = torch.full_like(largest, epsilon), largest
    for i in range(steps):
        slope, out = _slope(logits, x, y, noise, draw, delta)
        most = torch.stack(out.argmax(1).chunk(copies)).mode(0).values
        wrong, size = (most != y).view(-1, 1, 1, 1), norms(delta)
        better = wrong & (size < smallest)
        smallest, best = torch.where(better, size, smallest), torch.where(better, delta, best)
        length = 0.01 + 0.99 * (1 + math.cos(math.pi * (i + 1) / steps)) / 2
        delta = delta + length * _direction(slope, draw)
        norm = torch.minimum(norm * torch.where(wrong, 1 - DDN_CHANGE, 1 + DDN_CHANGE), largest)
        delta = delta * norm / norms(delta).clamp(min=1e-12)
        delta = (x + delta).clamp(0, 1) - x
    return within(best, epsilon)


def _slope(logits: Logits, x: Tensor, y: Tensor, noise: Tensor, draw: StepDraw, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the smoothed loss at x + delta, and the copies' logits."""
    copies = len(noise) // len(x)
    delta = delta.detach().requires_grad_()
    out = logits(repeated(x + delta, copies) + noise, Copies(draw, copies))
    return gradient(smoothed_loss(out, y, copies), delta), out.detach()


def _direction(slope: Tensor, draw: StepDraw) -> Tensor:
    """Normalise each row's gradient; a row without one gets a random direction, as released."""
    size = norms(slope)
    found = slope / size.clamp(min=torch.finfo(size.dtype).tiny)
    if bool((size == 0).any()):
        found = torch.where(size == 0, draw.normal(*slope.shape[1:]).to(slope), found)
    return found
