"""Simultaneous perturbation stochastic approximation: descent by a loss that can only be evaluated.

Spall's SPSA (1992), from one side or two, and SPSA-GC, which corrects its steps by Nesterov's look-ahead
(BlackVIP, Oh et al. 2023, arXiv 2303.14773). All randomness is torch's global CPU generator's, so the
same state of it draws the same directions on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.interface import Draw
from bench.io.files import file_sha256

SOURCE = file_sha256(Path(__file__))  # read once: what runs, should the file be edited meanwhile
RECENT = 50  # memory, in steps, of the mean loss that is compared to the first


class Diverged(Exception):
    """The loss is not finite, or stays far above where it began; the message says which, and at which step."""


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
        """a_k, how far step k goes."""
        return self.a / math.pow(k + self.o, self.alpha)

    def probe(self, k: int) -> float:
        """c_k, how far from the parameters step k evaluates the loss."""
        return self.c / math.pow(k, self.gamma)


def directions(count: int) -> Tensor:
    """One random direction: ``count`` independent values, uniform on [-1, -.5] and [.5, 1] together."""
    size = 0.5 + 0.5 * torch.rand(count)
    return torch.where(torch.rand(count) < 0.5, -size, size)


class SPSA:
    """Minimises a loss over ``parameters`` without gradients; ``state_dict`` holds its schedule and momentum.

    A step averages ``probes`` estimates, each along one random direction d: the two-sided
    (L(w + c_k d) - L(w - c_k d)) / (2 c_k d), or with ``one_sided`` (L(w + c_k d) - L(w)) / (c_k d), where
    L(w) is evaluated once for all. That is 2 * probes or 1 + probes evaluations. Then m <- b m + g and
    w <- w - a_k (g + b m).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], gains: Gains, probes: int = 1, one_sided: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.gains, self.probes, self.one_sided = gains, probes, one_sided
        self.k = 0  # steps done
        self.momentum = torch.zeros_like(nn.utils.parameters_to_vector(self.parameters).detach())
        self.start = self.recent = 0.0  # loss of the first step, and mean of late

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: without k the gains begin anew."""
        return {"k": self.k, "momentum": self.momentum, "start": self.start, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken."""
        self.k, self.start, self.recent = state["k"], state["start"], state["recent"]
        self.momentum = state["momentum"].to(self.momentum)

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Tensor], c: float) -> tuple[Tensor, float]:
        """The estimated gradient at the parameters, which are left as they were, and the mean of the losses seen."""
        here = nn.utils.parameters_to_vector(self.parameters)

        def at(w: Tensor) -> float:
            nn.utils.vector_to_parameters(w, self.parameters)
            # In double precision: the difference of two near losses is all there is.
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
        """One step; ``loss()`` must be the same function at each of its calls. Returns the mean of the losses seen.

        Raises Diverged.
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
        # A multiple of the start alone would be reached by chance where the start is near 0.
        if self.recent > 2 * self.start + 1:
            raise Diverged(f"SPSA diverged: by step {k} its loss rose from {self.start:.3g} to {self.recent:.3g}")

    def check_end(self) -> None:
        """Raise Diverged where the last steps' mean loss is clearly above the first's: a bounded loss grows no further.

        Not asked on the way, since momentum may overshoot at first and come back.
        """
        if self.recent > 1.25 * self.start + 0.25:
            raise Diverged(f"SPSA ended where its loss is {self.recent:.3g}; it began at {self.start:.3g}")


class Replay:
    """A draw whose values can be drawn again; satisfies ``interface.Draw``.

    Probes of one step must differ in nothing but the parameters: noise of their own would drown the
    difference of their losses.
    """

    def __init__(self, draw: Draw) -> None:
        self.sigma = draw.sigma
        self._draw = draw
        self._drawn: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """From here on ``normal`` gives the same values again, in the same order."""
        self._next = 0

    def normal(self, *shape: int) -> Tensor:
        """The next noise. Raises ValueError where that of another shape came here before."""
        if self._next == len(self._drawn):
            self._drawn.append(self._draw.normal(*shape))
        found = self._drawn[self._next]
        if found.shape[1:] != shape:
            raise ValueError(f"noise of shape {shape} where an earlier probe drew {tuple(found.shape[1:])}")
        self._next += 1
        return found
