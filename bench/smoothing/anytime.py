"""The anytime procedure: votes stop as soon as the answer is known, with the same guarantee.

It tests the radii of the report, lowest first, with a finite-mixture test martingale (Wald 1945;
Robbins 1970; Ville's inequality as in Ramdas et al. 2023, arXiv 2210.01948) and one Clopper-Pearson
test at the cap. docs/certification.md says why this is valid and what it saves.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bench.smoothing import bounds
from bench.smoothing.procedures import Counts, Fixed, Procedure, Target, Votes, decide

Floats = NDArray[np.float64]

# What ln W must exceed its threshold by. The terms of ln W reach 1e7 at 1e7 votes and cancel; the
# error left was below 1e-8 against mpmath.
LOG_SLACK = 1e-6


@dataclass(frozen=True)
class Anytime:
    """Certifies the radii of a grid, lowest first; the chance of any false one is at most ``alpha`` per image.

    Radius 0 (p > 1/2) is always the first of the grid. All fields determine the certificates; those after
    ``target`` are constants whose change makes another procedure. The cap ``n`` must be set before seeing votes.
    """

    n0: int
    n: int
    alpha: float
    radii: tuple[float, ...]
    target: Target = "selected"
    ville_share: float = 0.8  # of alpha, for W at every look; the rest for Clopper-Pearson at the cap
    components: int = 16  # alternatives in the mixture, the best detectors for stopping times ...
    fastest: int = 60  # ... geometric from this many votes ...
    slowest: float = 0.6  # ... to this share of the cap
    futility: float = 0.18  # give-up level at the cap: the knob of votes against loss, of no effect on soundness
    step: int = 32  # looks lie at multiples of this (of the engine's tile of 16, so that no rows are wasted) ...
    growth: float = 0.02  # ... and no closer than this share of the votes so far
    kind: ClassVar[str] = "anytime"

    @property
    def most(self) -> int:
        """The most votes an image can cost."""
        return self.n + (self.n0 if self.target == "selected" else 0)

    def __post_init__(self) -> None:
        """Refuse a grid whose order would silently change what is tested."""
        if any(a >= b for a, b in itertools.pairwise((0.0, *self.radii))):
            raise ValueError(f"radii must be positive and rising, not {self.radii}")

    def certify(self, sigma: float, label: int, tau: float = 0.0) -> Procedure:
        """One image's procedure; ``tau`` is the total-variation error of the noise, charged to the thresholds."""
        tables, n0, top = tabulate(self, sigma, tau), 0, label
        if self.target == "selected":
            n0, top = self.n0, int((yield Votes("select", self.n0))[:-1].argmax())
        drawn = level = 0
        counts: Counts | None = None
        for look, accept, give_up in zip(tables.looks, tables.accept, tables.give_up, strict=True):
            fresh = yield Votes("estimate", look - drawn, self.n - look)
            counts, drawn = fresh if counts is None else counts + fresh, look
            hits = int(counts[top])
            reached = bisect_right(accept, hits)
            if reached > level or not level:  # while nothing is certified the latest look is the one recorded
                level, n, decisive = max(level, reached), look, counts
            if level == len(accept) or hits < give_up[level]:
                break
        p_lower, radius = tables.result(level)
        return decide(top, decisive, n0, n, n0 + drawn, p_lower, radius)

    def recompute(self, sigma: float, n: int, top_count: int, tau: float = 0.0) -> tuple[float, float]:
        """``p_lower`` and radius from the decisive look alone; ``p_lower`` <= 1/2 means abstained."""
        tables = tabulate(self, sigma, tau)
        at = bisect_left(tables.looks, n)
        if at == len(tables.looks) or tables.looks[at] != n or not 0 <= top_count <= n:
            raise ValueError(f"{top_count} of {n} votes is no look of this procedure")
        return tables.result(bisect_right(tables.accept[at], top_count))

    def largest_radius(self, sigma: float, tau: float = 0.0) -> float:
        """Return the largest radius of the grid that any image can be certified at."""
        tables = tabulate(self, sigma, tau)
        return tables.result(len(tables.radii))[1]

    def levels(self, looks: Counts) -> Floats:
        """Give-up level at each look.

        It rises with the votes spent: giving up early forfeits images that a few more votes might certify,
        late only those that would barely be certified. At the votes of a constant level the loss,
        averaged over radii, is a quarter less on CIFAR-10.
        """
        return self.futility * np.sqrt(looks / self.n)


@dataclass(frozen=True)
class Tables:
    """All that a look needs for one noise level, shared by the images.

    Rows are looks, columns the radii within reach, lowest first.
    """

    radii: tuple[float, ...]
    p0: tuple[float, ...]  # Phi(radius / sigma), rounded up
    looks: list[int]
    accept: list[list[int]]  # fewest votes for the class that certify the radius and all below; no row falls
    give_up: list[list[int]]  # with fewer than this the radius, and so all above, is given up

    def result(self, level: int) -> tuple[float, float]:
        """``p_lower`` and radius once the ``level`` lowest radii are certified."""
        return (self.p0[level - 1], self.radii[level - 1]) if level else (0.0, 0.0)


@functools.cache
def tabulate(config: Anytime, sigma: float, tau: float = 0.0) -> Tables:
    """Tables of one noise level. W rises with the votes for the class, so "W is large" is a count to reach."""
    looks = schedule(config)
    cap_alpha = (1 - config.ville_share) * config.alpha
    radii, thresholds, accept, give_up = [], [], [], []
    for radius in (0.0, *config.radii):
        p0 = float(special.ndtr(radius / sigma)) * (1 + bounds.SLACK)
        sampled = p0 + tau  # what the votes, whose noise is not quite Gaussian, must show
        if sampled >= 1:
            break
        reach = _reach(config, sampled, looks)
        # Clopper-Pearson certifies from the first count whose bound is at least p0; n + 1 when none is.
        at_cap = functools.partial(bounds.lower_bound, n=config.n, alpha=cap_alpha)
        by_cap = bisect_left(range(config.n + 1), sampled, key=at_cap)
        reach[-1] = needed = min(int(reach[-1]), by_cap)
        if needed > config.n:  # out of reach even when all votes agree; so are the radii above
            break
        # An image certified at the cap half of the time: what the votes must be compatible with to go on.
        required = float(special.betaincinv(needed, config.n - needed + 1, 0.5))
        plausible = np.ceil(special.bdtrik(config.levels(looks), looks, required)).astype(np.int64)
        radii.append(radius)
        thresholds.append(p0)
        accept.append(reach)
        give_up.append(np.maximum(plausible, needed - (config.n - looks)))
    # A radius counts only with all lower ones at the same look, so that the decisive look alone gives the radius.
    shape = (len(radii), len(looks))
    accept_all = np.maximum.accumulate(np.reshape(accept, shape), axis=0).T.tolist()
    return Tables(tuple(radii), tuple(thresholds), looks.tolist(), accept_all, np.reshape(give_up, shape).T.tolist())


def schedule(config: Anytime) -> Counts:
    """Votes at each look: the same for every image, so that results do not depend on how votes are packed."""
    looks, look = [], 2 * config.step
    while look < config.n:
        looks.append(look)
        look += config.step * max(1, math.ceil(config.growth * look / config.step))
    return np.array([*looks, config.n], np.int64)


def log_wealth(p0: float, alternatives: Floats, hits: Counts, votes: Counts) -> Floats:
    """Log of W, the likelihood ratio of the uniform mixture of ``alternatives`` to ``p0``.

    Every term is a supermartingale under any p <= p0, its factor per vote having mean
    p q/p0 + (1-p)(1-q)/(1-p0) <= 1, so P(W ever >= 1/a) <= a by Ville's inequality.
    """
    hit, miss = np.log(alternatives / p0), np.log1p(-alternatives) - math.log1p(-p0)
    terms = hits[..., None] * hit + (votes - hits)[..., None] * miss
    return np.asarray(special.logsumexp(terms, axis=-1) - math.log(len(alternatives)), np.float64)


def mixture(config: Anytime, p0: float) -> Floats:
    """Alternatives q > p0 with KL(q || p0) = ln(1/alpha) / t: each the best detector for one stopping time t.

    A t too short for any q gives one alternative just below 1.
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


def _reach(config: Anytime, p0: float, looks: Counts) -> Counts:
    """At each look the fewest votes with which W certifies p > p0; one more than all when none do."""
    alternatives = mixture(config, p0)
    enough = math.log(1 / (config.ville_share * config.alpha)) + LOG_SLACK
    low, high = np.full_like(looks, -1), looks + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        passes = log_wealth(p0, alternatives, middle, looks) >= enough
        low, high = np.where(passes, low, middle), np.where(passes, middle, high)
    return high


def describe(procedure: Fixed | Anytime) -> dict[str, Any]:
    """A procedure as the record states it: its kind and every constant."""
    fields = asdict(procedure)
    return {"kind": procedure.kind, **fields, **({"radii": list(fields["radii"])} if "radii" in fields else {})}


def procedure_of(identity: dict[str, Any]) -> Fixed | Anytime:
    """The procedure a record states; the inverse of ``describe``."""
    fields = {k: v for k, v in identity["procedure"].items() if k != "kind"}
    if identity["procedure"]["kind"] == "fixed":
        return Fixed(**fields)
    if identity["procedure"]["kind"] == "adaptive":  # of an imported log: no image gets beyond its cap
        return Fixed(fields["n0"], fields["n"], fields["alpha"])
    return Anytime(**{**fields, "radii": tuple(fields["radii"])})
