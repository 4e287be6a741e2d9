"""Certification procedures: how many votes an image gets, and what they prove.

A procedure is a generator, one an image. It yields the votes it wants, is sent their counts (one
entry per class, then the votes whose logits held a NaN) and returns the image's Decision. It knows
neither images nor noise, only counts, so its error probability is a statement of pure statistics.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bench.smoothing import bounds

Counts = NDArray[np.int64]
MOST = 10**9  # votes an image, at most: bounds at more take seconds each, and hours to check at high precision


@dataclass(frozen=True)
class Votes:
    """A procedure's request: ``count`` more votes of a purpose, numbered on from those before.

    ``later`` bounds the votes of that purpose it may still ask for afterwards: an engine with room to
    spare may draw them ahead. What is drawn and never asked for decides nothing.
    """

    purpose: str
    count: int
    later: int = 0


@dataclass(frozen=True)
class Decision:
    """What a procedure concludes of one image; ``predicted`` None means it abstains, with radius 0.

    ``n``, ``top_count`` and the runner-up are those of the decisive look, of which the radius is a
    function; ``votes`` is what the image cost, selection included.
    """

    predicted: int | None
    radius: float
    n0: int
    n: int
    top_count: int
    runner_up: int | None
    runner_up_count: int
    p_lower: float
    votes: int


Procedure = Generator[Votes, Counts, Decision]


# The class whose probability is bounded: selected on votes of its own (what a deployer can do), or
# the known label (all that a benchmark's certified accuracy needs).
Target = Literal["selected", "label"]


@dataclass(frozen=True)
class Fixed:
    """Cohen et al. 2019 (arXiv 1902.02918): n0 votes choose the class, n fresh ones bound its probability."""

    n0: int
    n: int
    alpha: float
    target: Target = "selected"
    kind: ClassVar[str] = "fixed"

    @property
    def most(self) -> int:
        """The most votes an image can cost."""
        return self.n + (self.n0 if self.target == "selected" else 0)

    def certify(self, sigma: float, label: int, tau: float = 0.0) -> Procedure:
        """One image's procedure; ``tau`` is the total-variation error of the noise, charged to the bound."""
        n0, top = 0, label
        if self.target == "selected":
            n0, top = self.n0, int((yield Votes("select", self.n0))[:-1].argmax())
        counts = yield Votes("estimate", self.n)
        p_lower, radius = self.recompute(sigma, self.n, int(counts[top]), tau)
        return decide(top, counts, n0, self.n, n0 + self.n, p_lower, radius)

    def recompute(self, sigma: float, n: int, top_count: int, tau: float = 0.0) -> tuple[float, float]:
        """``p_lower`` and radius from the recorded counts; ``p_lower`` <= 1/2 means abstained.

        Raises ValueError where the procedure never decides at ``n`` votes.
        """
        if n != self.n:
            raise ValueError(f"the procedure decides at {self.n} votes, not at {n}")
        p_lower = max(0.0, bounds.lower_bound(top_count, n, self.alpha) - tau)
        return p_lower, bounds.radius(p_lower, sigma)

    def largest_radius(self, sigma: float, tau: float = 0.0) -> float:
        """The largest radius that any image can be certified at: that of ``n`` votes which all agree."""
        return self.recompute(sigma, self.n, self.n, tau)[1]


def decide(top: int, counts: Counts, n0: int, n: int, votes: int, p_lower: float, radius: float) -> Decision:
    """What goes to the record; the runner-up may be NaN, numbered as the class after the last."""
    others = counts.copy()
    others[top] = -1
    second = int(others.argmax())
    return Decision(
        predicted=top if p_lower > 0.5 else None,
        radius=radius,
        n0=n0,
        n=n,
        top_count=int(counts[top]),
        runner_up=second if others[second] > 0 else None,
        runner_up_count=int(others[second]),
        p_lower=p_lower,
        votes=votes,
    )
