"""Perturbations that a certificate speaks of: inside an l2 ball, inside the image range, on the pixel grid of the run.

A certificate of grid noise holds for images of integer pixels alone, so an attack on it must give integers too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SAFE = 1 - 1e-12  # of a squared radius: covers the rounding of sums of squares


@dataclass(frozen=True)
class Placed:
    """An attacked image as the run's noise takes it, and its l2 distance from the clean one, rounded up."""

    image: NDArray[Any]  # [C, H, W]: integers for grid noise, else float32 in [0, 1]
    distance: float


def unit(direction: Tensor) -> Tensor:
    """Scale to length 1; zero stays zero."""
    length = torch.linalg.vector_norm(direction)
    return direction / length if length > 0 else torch.zeros_like(direction)


def project(x: Tensor, delta: Tensor, radius: float) -> Tensor:
    """Return the perturbation with x + it in [0, 1] and of length at most ``radius``."""
    delta = (x + delta).clamp(0, 1) - x
    length = float(torch.linalg.vector_norm(delta))
    return delta if length <= radius else delta * (radius / length)  # shorter stays within [0, 1], which is convex


def reach(x: Tensor) -> float:
    """Return the largest l2 distance from x to an image with pixels in [0, 1]."""
    return float(torch.linalg.vector_norm(torch.maximum(x, 1 - x).double()))


def place_float(x: NDArray[np.float32], delta: NDArray[np.float32], radius: float) -> Placed:
    """Add a perturbation in float32, inside ball and range; it shrinks until float32 rounding keeps it inside."""
    wanted, shrink = delta.astype(np.float64), 0.0
    while True:
        image = np.clip(x + ((1 - shrink) * wanted).astype(np.float32), np.float32(0), np.float32(1))
        squared = float(np.sum((image.astype(np.float64) - x) ** 2))
        if squared <= radius**2 * SAFE or shrink >= 1:
            return Placed(image, _distance(squared))
        shrink = min(1.0, max(2 * shrink, 1e-7))


def place_grid(pixels: NDArray[np.integer[Any]], delta: NDArray[np.float32], radius: float, levels: int) -> Placed:
    """Move integer pixels along a perturbation, as far as the ball allows.

    Of all integer moves of a length, round(c * delta) has the largest inner product with delta, for the c that gives
    this length; the largest such c is sought by bisection. What the ball then still allows goes to single further steps
    of pixels, those with the largest gain for their cost first.
    """
    start, most = pixels.astype(np.int64), (radius * (levels - 1)) ** 2 * SAFE
    scaled = delta.astype(np.float64)

    def moved(c: float) -> NDArray[np.int64]:
        return np.clip(start + np.rint(np.clip(c * scaled, -levels, levels)).astype(np.int64), 0, levels - 1) - start

    largest = float(np.abs(scaled).max(initial=0.0))
    low, high = 0.0, levels / largest if largest > 0 else 0.0
    if np.sum(moved(high) ** 2) > most:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if np.sum(moved(middle) ** 2) <= most else (low, middle)
    else:
        low = high
    move = moved(low)
    _fill(move, start, scaled, most, levels)
    squared = int(np.sum(move**2))
    return Placed((start + move).astype(pixels.dtype), _distance(squared / (levels - 1) ** 2))


def _fill(
    move: NDArray[np.int64], start: NDArray[np.int64], wanted: NDArray[np.float64], most: float, levels: int
) -> None:
    """Take further single steps towards ``wanted`` while the squared length stays within ``most``."""
    flat, side = move.reshape(-1), np.sign(wanted).astype(np.int64).reshape(-1)
    there = start.reshape(-1) + flat + side
    cost = (flat + side) ** 2 - flat**2
    gain = np.where((there >= 0) & (there < levels) & (side != 0), np.abs(wanted.reshape(-1)) / np.maximum(cost, 1), 0)
    left = most - float(np.sum(flat**2))
    for i in np.argsort(-gain, kind="stable").tolist():
        if left < 1 or gain[i] <= 0:
            return
        if cost[i] <= left:
            flat[i] += side[i]
            left -= float(cost[i])


def _distance(squared: float) -> float:
    return math.nextafter(math.sqrt(squared), math.inf) if squared else 0.0
