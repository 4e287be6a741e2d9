"""The loss around an image, on a plane through its gradient and a random direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.inspection.copies import Copies
from bench.inspection.gradients import loss_of
from bench.interface import Logits

POINTS = 21  # on a side
REACH = 2.0  # from the image to each side, in sigmas


@dataclass(frozen=True)
class Landscape:
    """The mean loss over the noisy copies: rows along the random direction, columns along the gradient."""

    offsets: NDArray[np.float64]  # l2 distances from the image, of rows and of columns
    losses: NDArray[np.float64]
    gradient: bool  # False: the gradient is zero or undefined, and another random direction takes its place


def landscape(
    model: Logits, copies: Copies, mean_gradient: Tensor, rows: int, done: Callable[[], None] = lambda: None
) -> Landscape:
    """Evaluate the loss on the plane.

    Args:
        model: Noisy pixels and draws to logits.
        copies: The image; every point of the plane has the same noise.
        mean_gradient: Of the mean loss over the copies, [C, H, W].
        rows: Images that the model is given at a time, about.
        done: Called after each row of the plane.
    """
    first, second, known = directions(copies, mean_gradient)
    offsets = np.linspace(-REACH, REACH, POINTS) * copies.sigma
    along = [float(a) * first for a in offsets]
    noisy, at_once = copies.noisy, max(1, rows // copies.count)
    losses = np.empty((POINTS, POINTS))
    with torch.no_grad():
        for i, across in enumerate(offsets):
            for start in range(0, POINTS, at_once):
                points = [noisy + step + float(across) * second for step in along[start : start + at_once]]
                found = loss_of(model, copies, torch.cat(points)).view(len(points), copies.count)
                losses[i, start : start + len(points)] = found.double().mean(1).cpu().numpy()
            done()
    return Landscape(offsets, losses, known)


def directions(copies: Copies, mean_gradient: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return two orthogonal directions of length 1, and whether the first is the gradient's.

    The second is a random one, the same for all models before its part along the first is removed.
    """
    norm = float(mean_gradient.double().norm())
    known = math.isfinite(norm) and norm > 0
    first = mean_gradient.double() / norm if known else copies.direction(1).double()
    first = first / first.norm()
    second = copies.direction(0).double()
    second = second - (second * first).sum() * first
    second = second / second.norm()
    return first.to(mean_gradient.dtype), second.to(mean_gradient.dtype), known
