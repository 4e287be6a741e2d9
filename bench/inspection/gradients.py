"""Input gradients at noisy copies: their norm, the loss's curvature along them, and how they align with the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inspection.copies import Copies
from bench.inspection.score import Denoiser
from bench.interface import Logits

STEP = 0.1  # of the finite difference, in sigmas
MOVE = 2.0  # length of an on- or off-manifold step, in sigmas


@dataclass(frozen=True)
class Gradients:
    """One number for each noisy copy, [count]; NaN where it is not defined, as the cosine of a zero gradient."""

    loss: Tensor
    gradient_norm: Tensor
    curvature: Tensor
    score_cosine: Tensor
    score_cosine_sum: Tensor
    change_on: Tensor
    change_off: Tensor


def loss_of(model: Logits, copies: Copies, x: Tensor) -> Tensor:
    """Return the cross-entropy of the label for each row of ``x`` [times * count, C, H, W]; rows follow the copies."""
    logits = model(x, copies.draw(len(x) // copies.count))
    return F.cross_entropy(logits, torch.full((len(x),), copies.label, device=x.device), reduction="none")


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value for each row, and its gradient by that row; NaN where no gradient reaches the pixels.

    Args:
        function: From [B, C, H, W] to [B], each row from its own image alone.
        x: Pixels [B, C, H, W].
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(x)
        if not value.requires_grad:
            return value.detach(), torch.full_like(x, torch.nan).detach()
        (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return value.detach(), torch.full_like(x, torch.nan).detach() if found is None else found.detach()


def measure(model: Logits, copies: Copies, denoiser: Denoiser) -> tuple[Gradients, Tensor]:
    """Measure a model at the noisy copies of an image.

    Args:
        model: Noisy pixels [B, C, H, W] and draws to logits [B, classes].
        copies: The image.
        denoiser: Whose score and tangent directions are compared with the model's gradients.

    Returns:
        The numbers, and the gradient of the mean loss over the copies, [C, H, W].
    """
    x = copies.noisy
    loss, by_pixel = gradient(lambda x: loss_of(model, copies, x), x)
    _, of_sum = gradient(lambda x: model(x, copies.draw()).sum(1), x)
    score = denoiser.score(x, copies.draw())
    on, off = _changes(model, copies, denoiser)
    found = Gradients(
        loss=loss,
        gradient_norm=by_pixel.flatten(1).norm(dim=1),
        curvature=_curvature(model, copies, x, by_pixel),
        # Of the log-probability of the label, whose negative is the loss.
        score_cosine=cosine(-by_pixel, score),
        score_cosine_sum=cosine(of_sum, score),
        change_on=on,
        change_off=off,
    )
    return found, by_pixel.mean(0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of the angle between the rows of [B, C, H, W]; NaN where a row is zero."""
    return (unit(a) * unit(b)).flatten(1).sum(1)


def unit(rows: Tensor) -> Tensor:
    """Scale each row of [B, C, H, W] to length 1; NaN where it is zero."""
    # In float64, since a confident model's gradients may have squares below the smallest float32.
    norm = rows.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (rows.double() / torch.where(norm > 0, norm, torch.nan)).to(rows.dtype)


def _curvature(model: Logits, copies: Copies, x: Tensor, by_pixel: Tensor) -> Tensor:
    """Return the second derivative of the loss along its gradient, by a central difference of gradients."""
    along, step = unit(by_pixel), STEP * copies.sigma
    _, above = gradient(lambda x: loss_of(model, copies, x), x + step * along)
    _, below = gradient(lambda x: loss_of(model, copies, x), x - step * along)
    return ((above - below) * along).flatten(1).sum(1) / (2 * step)


def _changes(model: Logits, copies: Copies, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """Return how far the probabilities move for a step on and a step off the manifold, in the l1 norm."""
    x, noise = copies.noisy, copies.directions()
    tangent = denoiser.tangent(x, noise, copies.draw())
    with torch.no_grad():
        before = model(x, copies.draw()).softmax(1)

        def change(direction: Tensor) -> Tensor:
            after = model(x + MOVE * copies.sigma * unit(direction), copies.draw()).softmax(1)
            return (after - before).abs().sum(1)

        return change(tangent), change(noise - tangent)
