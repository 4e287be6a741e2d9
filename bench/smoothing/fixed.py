"""The fixed procedure: every image gets the same number of votes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.smoothing import bounds
from bench.smoothing.votes import Counts, Decision, ImageProcedure, Target, VoteRequest, decide, stop


@dataclass(frozen=True)
class Fixed:
    """Cohen et al. 2019 (arXiv 1902.02918): n0 votes select the class, n fresh ones bound its probability."""

    n0: int
    n: int
    alpha: float
    target: Target = "selected"
    kind: ClassVar[str] = "fixed"

    @property
    def selection_votes(self) -> int:
        """Votes of an image that select its class."""
        return 0 if self.target == "label" else self.n0

    @property
    def max_votes(self) -> int:
        """Votes of an image, selection included; fewer where target "correct" stops."""
        return self.selection_votes + self.n

    def certify(self, sigma: float, label: int, tau: float = 0.0) -> ImageProcedure:
        """Start the procedure for one image; ``tau``, the noise's total-variation error, lowers the bound."""
        return _FixedImage(self, sigma, label, tau)

    def recompute(self, sigma: float, n: int, top_count: int, tau: float = 0.0) -> tuple[float, float]:
        """Return ``p_lower`` and radius for recorded counts; ``p_lower`` <= 1/2 means abstained.

        Raises ValueError if the procedure never decides at ``n`` votes.
        """
        if self.target == "correct" and n == top_count == 0:  # it stopped
            return 0.0, 0.0
        if n != self.n:
            raise ValueError(f"the procedure decides at {self.n} votes, not at {n}")
        p_lower = max(0.0, bounds.lower_bound(top_count, n, self.alpha) - tau)
        return p_lower, bounds.radius(p_lower, sigma)

    def largest_radius(self, sigma: float, tau: float = 0.0) -> float:
        """Return the radius when all ``n`` votes agree, the largest possible."""
        return self.recompute(sigma, self.n, self.n, tau)[1]


class _FixedImage:
    """``Fixed`` at work on one image."""

    def __init__(self, config: Fixed, sigma: float, label: int, tau: float) -> None:
        self._config, self._sigma, self._label, self._tau = config, sigma, label, tau
        self._top = label if config.target == "label" else None  # the class to bound

    def first(self) -> VoteRequest:
        c = self._config
        return VoteRequest("select", c.n0) if self._top is None else VoteRequest("estimate", c.n)

    def update(self, counts: Counts) -> VoteRequest | Decision:
        c = self._config
        if self._top is None:
            self._top = int(counts[:-1].argmax())
            if c.target == "correct" and self._top != self._label:
                return stop(self._top, c.n0)
            return VoteRequest("estimate", c.n)
        p_lower, radius = c.recompute(self._sigma, c.n, int(counts[self._top]), self._tau)
        return decide(self._top, counts, c.selection_votes, c.n, c.max_votes, p_lower, radius)
