"""The anytime procedure: an image gets votes until the answer is known, with the same guarantee as ``Fixed``.

It tests the radii of the report, lowest first, each with a sequential test whose acceptance counts are exact
(``spending``). Where that is too large a computation, and in records of certbench 0.2.0 and before, the test is a
finite-mixture martingale (Wald 1945; Robbins 1970; Ville's inequality as in Ramdas et al. 2023, arXiv 2210.01948) with
one Clopper-Pearson test at the cap. docs/certification.md has the proofs and the votes saved.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bench.smoothing import bounds
from bench.smoothing.spending import acceptance_counts
from bench.smoothing.votes import Counts, Decision, ImageProcedure, Target, VoteRequest, decide, stop

Floats = NDArray[np.float64]

# Margin by which ln W must exceed its threshold. The terms of ln W reach 1e7 at 1e7 votes and cancel; the
# remaining error was below 1e-8 against mpmath.
LOG_SLACK = 1e-6

Calibration = Literal["exact", "ville"]

# Limits of the exact calibration: votes, votes times thresholds, and the smallest alpha. At these limits a table takes
# 1 s with the constants below, and 8 s and 100 MB with the costliest that a record may state.
EXACT_VOTES, EXACT_WORK, EXACT_ALPHA = 10**6, 2 * 10**7, 1e-12


def calibration(n: int, alpha: float, radii: tuple[float, ...]) -> Calibration:
    """Return how new runs make their acceptance counts: exactly, or by Ville's inequality beyond the limits."""
    small = n <= EXACT_VOTES and n * (1 + len(radii)) <= EXACT_WORK and alpha >= EXACT_ALPHA
    return "exact" if small else "ville"


@dataclass(frozen=True)
class Anytime:
    """Certifies the radii of a grid, lowest first; any false one has a chance of at most ``alpha`` per image.

    Radius 0 (p > 1/2) always comes first. All fields determine the certificates; those after ``target`` are constants
    whose change makes another procedure. The cap ``n`` must be set before seeing votes.
    """

    n0: int
    n: int
    alpha: float
    radii: tuple[float, ...]
    target: Target = "selected"
    calibration: Calibration = "exact"
    spending: float = 0.7  # exact: the chance of a false radius may reach alpha (votes / n) ** spending at a look
    # Ville's inequality only:
    ville_share: float = 0.8  # of alpha, for W at every look; the rest for Clopper-Pearson at the cap
    components: int = 16  # alternatives in the mixture, the best detectors for stopping times ...
    fastest: int = 60  # ... geometric from this number of votes ...
    slowest: float = 0.6  # ... to this share of the cap
    # Both:
    futility: float = 0.22  # give-up level at the cap: trades votes for loss, never soundness
    step: int = 32  # looks lie at multiples of this (of the engine's tile of 16, so that no rows are wasted) ...
    growth: float = 0.02  # ... at least this share of the votes so far apart
    kind: ClassVar[str] = "anytime"

    def __post_init__(self) -> None:
        """Refuse a grid whose order would silently change the tests, and tables that would take minutes."""
        if any(a >= b for a, b in itertools.pairwise((0.0, *self.radii))):
            raise ValueError(f"radii must be positive and rising, not {self.radii}")
        if self.calibration == "exact" and calibration(self.n, self.alpha, self.radii) != "exact":
            raise ValueError(
                f"calibration exact is for at most {EXACT_VOTES:,} votes, {EXACT_WORK:,} votes times thresholds and "
                f"alpha from {EXACT_ALPHA:g}; use ville"
            )

    @property
    def selection_votes(self) -> int:
        """Votes of an image that select its class."""
        return 0 if self.target == "label" else self.n0

    @property
    def max_votes(self) -> int:
        """Most votes of an image, selection included."""
        return self.selection_votes + self.n

    def certify(self, sigma: float, label: int, tau: float = 0.0) -> ImageProcedure:
        """Start the procedure for one image; ``tau``, the noise's total-variation error, raises the thresholds."""
        return _AnytimeImage(self, tabulate(self, sigma, tau), label)

    def recompute(self, sigma: float, n: int, top_count: int, tau: float = 0.0) -> tuple[float, float]:
        """Return ``p_lower`` and radius for a decisive look; ``p_lower`` <= 1/2 means abstained.

        Raises ValueError if the procedure has no such look.
        """
        if self.target == "correct" and n == top_count == 0:  # it stopped
            return 0.0, 0.0
        tables = tabulate(self, sigma, tau)
        at = bisect_left(tables.looks, n)
        if at == len(tables.looks) or tables.looks[at] != n or not 0 <= top_count <= n:
            raise ValueError(f"{top_count} of {n} votes is not a look of this procedure")
        return tables.result(bisect_right(tables.accept[at], top_count))

    def largest_radius(self, sigma: float, tau: float = 0.0) -> float:
        """Return the largest radius of the grid at which any image can be certified."""
        tables = tabulate(self, sigma, tau)
        return tables.result(len(tables.radii))[1]

    def levels(self, looks: Counts) -> Floats:
        """Return the give-up level at each look.

        It rises with the votes spent: giving up early forfeits images that a few more votes might certify, giving up
        late only those that would barely be certified. Compared with a constant level at the same number of votes,
        the loss averaged over radii is a quarter lower on CIFAR-10.
        """
        return self.futility * np.sqrt(looks / self.n)


class _AnytimeImage:
    """``Anytime`` at work on one image."""

    def __init__(self, config: Anytime, tables: Tables, label: int) -> None:
        self._config, self._tables, self._label = config, tables, label
        self._top = label if config.target == "label" else None  # the class to bound
        self._at = 0  # index of the next look
        self._level = 0  # number of radii certified
        self._counts: Counts | None = None  # of all looks so far
        self._decisive: tuple[int, Counts]  # votes and counts of the look to record

    def first(self) -> VoteRequest:
        return VoteRequest("select", self._config.n0) if self._top is None else self._next_look()

    def update(self, counts: Counts) -> VoteRequest | Decision:
        if self._top is None:
            self._top = int(counts[:-1].argmax())
            if self._config.target == "correct" and self._top != self._label:
                return stop(self._top, self._config.n0)
            return self._next_look()
        self._counts = counts if self._counts is None else self._counts + counts
        tables, at = self._tables, self._at
        look, accept = tables.looks[at], tables.accept[at]
        hits = int(self._counts[self._top])
        reached = bisect_right(accept, hits)
        if reached > self._level or not self._level:  # while no radius is certified, the latest look is recorded
            self._level, self._decisive = max(self._level, reached), (look, self._counts)
        if look == tables.looks[-1] or self._level == len(accept) or hits < tables.give_up[at][self._level]:
            n, decisive = self._decisive
            n0 = self._config.selection_votes
            return decide(self._top, decisive, n0, n, n0 + look, *tables.result(self._level))
        self._at += 1
        return self._next_look()

    def _next_look(self) -> VoteRequest:
        looks = self._tables.looks
        look, before = looks[self._at], looks[self._at - 1] if self._at else 0
        return VoteRequest("estimate", look - before, self._config.n - look)


@dataclass(frozen=True)
class Tables:
    """The counts that decide at each look for one noise level; all images share them.

    Rows are looks, columns the radii within reach, lowest first.
    """

    radii: tuple[float, ...]
    p0: tuple[float, ...]  # Phi(radius / sigma), rounded up
    looks: list[int]
    accept: list[list[int]]  # fewest votes for the class that certify the radius and all lower ones; rows never fall
    give_up: list[list[int]]  # with fewer votes than this, the procedure gives up on the radius and all above
    errors: tuple[float, ...]  # upper bound on the chance to certify the radius of an image with p <= p0

    def result(self, level: int) -> tuple[float, float]:
        """Return ``p_lower`` and radius if the ``level`` lowest radii are certified."""
        return (self.p0[level - 1], self.radii[level - 1]) if level else (0.0, 0.0)


# Bounded, since records are untrusted input: an entry takes 0.02 to 0.5 MB and 10 to 100 ms for usual grids, 25 MB and
# 8 s for the largest that a record may state.
@functools.lru_cache(maxsize=64)
def tabulate(config: Anytime, sigma: float, tau: float = 0.0) -> Tables:
    """Compute the tables of one noise level."""
    looks = schedule(config)
    radii, thresholds, accept, give_up, errors = [], [], [], [], []
    for radius in (0.0, *config.radii):
        p0 = float(special.ndtr(radius / sigma)) * (1 + bounds.SLACK)
        sampled = p0 + tau  # the votes must show this much, since their noise is not quite Gaussian
        if sampled >= 1:
            break
        reach, error = _reach(config, sampled, looks)
        needed = int(reach[-1])
        if needed > config.n:  # out of reach even if all votes agree; so are all larger radii
            break
        # The probability that is certified at the cap half of the time: votes incompatible with it end the test.
        required = float(special.betaincinv(needed, config.n - needed + 1, 0.5))
        plausible = np.ceil(special.bdtrik(config.levels(looks), looks, required)).astype(np.int64)
        radii.append(radius)
        thresholds.append(p0)
        accept.append(reach)
        errors.append(error)
        give_up.append(np.maximum(plausible, needed - (config.n - looks)))
    # A radius counts only together with all lower ones at the same look, so the decisive look alone gives the radius.
    shape = (len(radii), len(looks))
    accept_all = np.maximum.accumulate(np.reshape(accept, shape), axis=0).T.tolist()
    give_up_all = np.reshape(give_up, shape).T.tolist()
    return Tables(tuple(radii), tuple(thresholds), looks.tolist(), accept_all, give_up_all, tuple(errors))


def schedule(config: Anytime) -> Counts:
    """Return the votes at each look, the same for every image, so that packing cannot change results."""
    looks, look = [], 2 * config.step
    while look < config.n:
        looks.append(look)
        look += config.step * max(1, math.ceil(config.growth * look / config.step))
    return np.array([*looks, config.n], np.int64)


def log_wealth(p0: float, alternatives: Floats, hits: Counts, votes: Counts) -> Floats:
    """Return ln W, with W the likelihood ratio of the uniform mixture of ``alternatives`` to ``p0``.

    Under any p <= p0 every term is a supermartingale, because its factor per vote has mean
    p q/p0 + (1-p)(1-q)/(1-p0) <= 1. So P(W ever >= 1/a) <= a by Ville's inequality.
    """
    hit, miss = np.log(alternatives / p0), np.log1p(-alternatives) - math.log1p(-p0)
    terms = hits[..., None] * hit + (votes - hits)[..., None] * miss
    return np.asarray(special.logsumexp(terms, axis=-1) - math.log(len(alternatives)), np.float64)


def mixture(config: Anytime, p0: float) -> Floats:
    """Return alternatives q > p0 with KL(q || p0) = ln(1/alpha) / t, each the best detector for a stopping time t.

    If t is too short for any q, the alternative is just below 1.
    """
    slowest = config.slowest * config.n
    times = np.geomspace(min(config.fastest, slowest), slowest, config.components)
    target = math.log(1 / (config.ville_share * config.alpha)) / times
    low, high = np.full(len(times), p0), np.full(len(times), 1 - (1 - p0) / 1000)
    certain = high[0]
    for _ in range(60):
        middle = (low + high) / 2
        small = special.rel_entr(middle, p0) + special.rel_entr(1 - middle, 1 - p0) < target
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    kept = np.unique(np.where(high > 1 - (1 - p0) / 999, certain, high))
    return kept[kept > p0]


def _reach(config: Anytime, p0: float, looks: Counts) -> tuple[Counts, float]:
    """Return, for each look, the fewest votes that certify p > p0, and a bound on the chance to do so if p <= p0.

    The count is one more than all votes where all do not suffice.
    """
    if config.calibration == "exact":
        return acceptance_counts(p0, looks, config.alpha * (looks / config.n) ** config.spending)
    reach = _by_wealth(config, p0, looks)
    # Clopper-Pearson certifies from the first count whose bound is at least p0; n + 1 if there is none.
    at_cap = functools.partial(bounds.lower_bound, n=config.n, alpha=(1 - config.ville_share) * config.alpha)
    reach[-1] = min(int(reach[-1]), bisect_left(range(config.n + 1), p0, key=at_cap))
    return reach, config.alpha


def _by_wealth(config: Anytime, p0: float, looks: Counts) -> Counts:
    """Return, for each look, the fewest votes with which W certifies p > p0; W rises with the votes for the class."""
    alternatives = mixture(config, p0)
    enough = math.log(1 / (config.ville_share * config.alpha)) + LOG_SLACK
    low, high = np.full_like(looks, -1), looks + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        passes = log_wealth(p0, alternatives, middle, looks) >= enough
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    return high
