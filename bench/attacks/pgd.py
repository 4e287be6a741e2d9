"""Projected gradient descent on the soft smoothed classifier around one image (Salman et al. 2019, arXiv 1906.04584).

The soft smoothed classifier is the mean of the probabilities over noisy copies. Its gradient is estimated at each
step from new noise (expectation over transformation, Athalye et al. 2018, arXiv 1802.00420): through the defense by
backward passes, or without gradients from its answers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.attacks.perturb import project, unit
from bench.smoothing.noise import Noise, Vote, VoteDraw, to_device
from bench.smoothing.task import Model

Slope = Callable[[Tensor], Tensor]  # a perturbation [1, C, H, W] -> the direction in which the label loses


@dataclass
class Surroundings:
    """The classifier around one clean image, with noise of one purpose, and counts of what was computed."""

    model: Model
    x: Tensor  # clean pixels [1, C, H, W] in [0, 1]
    label: int
    sigma: float
    noise: Noise
    purpose: str
    index: int
    rows: int  # of a pass
    drawn: int = field(default=0, init=False)  # keys used so far
    gradients: int = field(default=0, init=False)
    zero: int = field(default=0, init=False)  # gradients that are zero or not finite

    def keys(self, count: int) -> list[Vote]:
        """Return new keys of noise."""
        self.drawn += count
        return [Vote(self.purpose, self.index, self.drawn - count + i) for i in range(count)]

    def normals(self, keys: Sequence[Vote]) -> Tensor:
        """Draw standard normal noise [len(keys), C, H, W]."""
        flat = self.noise.normals(list(keys), self.x[0].numel())
        return to_device(flat, self.x.device).view(len(keys), *self.x.shape[1:])

    def log_probabilities(self, delta: Tensor, keys: Sequence[Vote], noise: Tensor) -> Tensor:
        """Return the log-probabilities [len(keys), classes] of copies of x + delta with this noise."""
        draw = VoteDraw(self.noise, list(keys), self.sigma, self.x.device)
        return self.model(self.x + delta + self.sigma * noise, draw).float().log_softmax(1)

    def parts(self, keys: Sequence[Vote]) -> Iterator[Sequence[Vote]]:
        """Yield the keys of one pass after the other."""
        for begin in range(0, len(keys), self.rows):
            yield keys[begin : begin + self.rows]

    def count(self, gradient: Tensor) -> Tensor:
        """Count a gradient, and return it; where it is not finite, zero."""
        self.gradients += 1
        finite = bool(gradient.isfinite().all())
        self.zero += not finite or not bool(gradient.any())
        return gradient if finite else torch.zeros_like(gradient)

    def random(self) -> Tensor:
        """Draw a uniformly random direction of length 1, [1, C, H, W]."""
        return unit(self.normals(self.keys(1)))


def by_gradient(around: Surroundings, draws: int) -> Slope:
    """Return the gradient of -log of the label's mean probability over ``draws`` copies, by backward passes."""

    def slope(delta: Tensor) -> Tensor:
        logs, gradients = [], []
        for keys in around.parts(around.keys(draws)):
            at = delta.detach().requires_grad_()
            with torch.enable_grad():
                found = around.log_probabilities(at, keys, around.normals(keys))[:, around.label].logsumexp(0)
                gradient = torch.autograd.grad(found, at, allow_unused=True)[0] if found.requires_grad else None
            logs.append(float(found.detach()))
            gradients.append(torch.zeros_like(delta) if gradient is None else gradient)
        top = max(logs)  # each part has the weight of its probabilities
        weights = [math.exp(log - top) if math.isfinite(log) else 1.0 for log in logs]
        total = sum(weights)
        return around.count(-sum((w / total * g for w, g in zip(weights, gradients, strict=True)), start=delta * 0))

    return slope


def by_votes(around: Surroundings, pairs: int) -> Slope:
    """Return the gradient estimated from answers alone (Salman et al. 2019, their estimate without gradients).

    By Stein's lemma the gradient of E f(x + sigma z) is E f(x + sigma z) z / sigma; each draw is used with both signs,
    which removes what f has in common on both sides. f is the log-probability of the label.
    """

    @torch.no_grad()
    def slope(delta: Tensor) -> Tensor:
        found = torch.zeros_like(delta)
        for keys in around.parts(around.keys(pairs)):
            noise = around.normals(keys)
            sides = [around.log_probabilities(delta, keys, side * noise)[:, around.label] for side in (1, -1)]
            change = (sides[0] - sides[1]).nan_to_num(0.0, 0.0, 0.0)
            found -= (change.view(-1, 1, 1, 1) * noise).sum(0, keepdim=True)
        return found / (2 * around.sigma * pairs)

    return slope


def descend(around: Surroundings, slope: Slope, radius: float, steps: int, from_random: bool = False) -> Tensor:
    """Return the perturbation after ``steps`` steps of length 2 radius / steps; a step without a slope is random."""
    delta = torch.zeros_like(around.x)
    if from_random:  # uniform in the ball
        length = radius * float(torch.rand((), generator=_generator(around))) ** (1 / delta.numel())
        delta = project(around.x, length * around.random(), radius)
    for _ in range(steps):
        direction = unit(slope(delta))
        if not bool(direction.any()):
            direction = around.random()
        delta = project(around.x, delta + 2 * radius / steps * direction, radius)
    return delta.detach()


def _generator(around: Surroundings) -> torch.Generator:
    """Return a generator seeded by the next key, for a single number."""
    word = int(around.noise.words(around.keys(1), 1)[0, 0])
    return torch.Generator().manual_seed(word >> 1)


@torch.no_grad()
def margin(around: Surroundings, delta: Tensor, keys: Sequence[Vote]) -> float:
    """Return the label's mean probability less the largest of another class; the attack's aim is a low one."""
    total = torch.zeros(())
    for part in around.parts(keys):
        total = total + around.log_probabilities(delta, part, around.normals(part)).exp().sum(0).cpu()
    others = total.clone()
    others[around.label] = -math.inf
    return float(total[around.label] - others.max()) / len(keys)
