"""Simultaneous perturbation stochastic approximation (SPSA): optimisation without gradients.

Spall's SPSA (1992), one-sided or two-sided, and SPSA-GC with Nesterov's look-ahead (BlackVIP, Oh et al. 2023,
arXiv 2303.14773). Directions come from torch's global CPU generator, so they are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.interface import StepDraw

VERSION = 1  # raise it whenever weights trained here would change: it is part of their identity
RECENT = 50  # steps over which the recent loss is averaged


class Diverged(Exception):
    """The loss is not finite, or has risen far above its first value."""


@dataclass(frozen=True)
class Gains:
    """Step sizes a_k = a / (k + o)^alpha and probe sizes c_k = c / k^gamma of step k >= 1, and the momentum b."""

    a: float
    c: float
    o: float
    alpha: float
    gamma: float
    b: float = 0.0  # 0: plain SPSA

    def step(self, k: int) -> float:
        """Return a_k, the size of step k."""
        return self.a / math.pow(k + self.o, self.alpha)

    def probe(self, k: int) -> float:
        """Return c_k, the distance from the parameters at which step k evaluates the loss."""
        return self.c / math.pow(k, self.gamma)


def directions(count: int) -> Tensor:
    """Draw a direction: ``count`` independent values, uniform on the union of [-1, -.5] and [.5, 1]."""
    size = 0.5 + 0.5 * torch.rand(count)
    return torch.where(torch.rand(count) < 0.5, -size, size)


class SPSA:
    """A gradient-free optimiser; ``state_dict`` holds its step number and momentum.

    A step averages ``probes`` gradient estimates g, each along one random direction d: two-sided
    (L(w + c_k d) - L(w - c_k d)) / (2 c_k d), or with ``one_sided`` (L(w + c_k d) - L(w)) / (c_k d), where L(w) is
    evaluated once. That takes 2 * probes or 1 + probes evaluations. Then m <- b m + g and w <- w - a_k (g + b m).

    Args:
        parameters: The tensors to optimise, in place.
        gains: Step and probe sizes, and the momentum.
        probes: Directions averaged in each step.
        one_sided: Whether the loss at the parameters themselves replaces that on the second side.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], gains: Gains, probes: int = 1, one_sided: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.gains, self.probes, self.one_sided = gains, probes, one_sided
        self.k = 0  # steps done
        self.momentum = torch.zeros_like(nn.utils.parameters_to_vector(self.parameters).detach())
        self.start = self.recent = 0.0  # loss of the first step, and its recent mean

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a checkpoint; without k a resumed run would restart its gains."""
        return {"k": self.k, "momentum": self.momentum, "start": self.start, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.k, self.start, self.recent = state["k"], state["start"], state["recent"]
        self.momentum = state["momentum"].to(self.momentum)

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Tensor], c: float) -> tuple[Tensor, float]:
        """Return the estimated gradient and the mean of the evaluated losses; leave the parameters unchanged."""
        here = nn.utils.parameters_to_vector(self.parameters)

        def at(w: Tensor) -> float:
            nn.utils.vector_to_parameters(w, self.parameters)
            # In double precision, since the gradient is a difference of two close losses.
            return float(loss().double())

        centre = at(here) if self.one_sided else math.nan
        gradient, seen = torch.zeros_like(here), []
        for _ in range(self.probes):
            d = directions(len(here)).to(here)
            plus = at(here + c * d)
            minus = centre if self.one_sided else at(here - c * d)
            gradient += (plus - minus) / ((1 if self.one_sided else 2) * c * d) / self.probes
            seen += [plus, minus]
        nn.utils.vector_to_parameters(here, self.parameters)
        return gradient, sum(seen) / len(seen)

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor]) -> float:
        """Do one step.

        Args:
            loss: Evaluates the loss at the current parameters; must be the same function at each of its calls.

        Returns:
            The mean of the evaluated losses.

        Raises:
            Diverged: The loss is not finite, or has risen far above its first value.
        """
        k = self.k + 1
        g, value = self.estimate(loss, self.gains.probe(k))
        self._watch(value, k)
        self.momentum = self.gains.b * self.momentum + g
        w = nn.utils.parameters_to_vector(self.parameters)
        w -= self.gains.step(k) * (g + self.gains.b * self.momentum)
        nn.utils.vector_to_parameters(w, self.parameters)
        self.k = k
        return value

    def _watch(self, value: float, k: int) -> None:
        if not math.isfinite(value):
            raise Diverged(f"SPSA diverged: loss {value} at step {k}")
        if k == 1:
            self.start = self.recent = value
        self.recent += (value - self.recent) / RECENT
        # + 1, since a first loss near 0 is doubled by chance.
        if self.recent > 2 * self.start + 1:
            raise Diverged(f"SPSA diverged: by step {k} its loss rose from {self.start:.3g} to {self.recent:.3g}")

    def check_end(self) -> None:
        """Raise Diverged where the final mean loss is clearly above the first.

        A bounded loss may never exceed the limit that ``step`` checks. Checked at the end alone, since momentum may
        overshoot at first and recover.
        """
        if self.recent > 1.25 * self.start + 0.25:
            raise Diverged(f"SPSA diverged: its loss rose from {self.start:.3g} to {self.recent:.3g}")


class Replay:
    """A draw that can be replayed; satisfies ``interface.StepDraw``.

    All probes of a step need the same noise: different noise would hide the difference of their losses.
    """

    def __init__(self, draw: StepDraw) -> None:
        self.sigma, self.done, self.rows = draw.sigma, draw.done, draw.rows
        self._draw = draw
        self._drawn: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """Make ``normal`` return the same values again, in the same order."""
        self._next = 0

    def evaluating(self) -> AbstractContextManager[None]:
        """Set what is trained to eval mode, as the step's own draw does."""
        return self._draw.evaluating()

    def normal(self, *shape: int) -> Tensor:
        """Return the next noise. Raises ValueError where its shape differs from the one drawn before."""
        if self._next == len(self._drawn):
            self._drawn.append(self._draw.normal(*shape))
        found = self._drawn[self._next]
        if found.shape[1:] != shape:
            raise ValueError(f"this probe draws noise of shape {shape}, an earlier one {tuple(found.shape[1:])}")
        self._next += 1
        return found
