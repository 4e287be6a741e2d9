"""The votes that the anytime procedure needs for each radius of its grid, computed from its tables."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from bench.smoothing.anytime import Anytime, Floats, Tables, tabulate

NEGLIGIBLE = 1e-16  # probability of a count that is left out
LARGEST_CAP = 10**6  # votes: beyond, the distributions of counts are wide and take minutes


@dataclass(frozen=True)
class RadiusCost:
    """Votes of an image, selection included; None where the radius is out of reach.

    ``fewest_votes`` certify the radius, if all agree. ``typical_votes`` is the mean of an image whose own radius lies
    half a step of the grid beyond this one, and ``share`` its part of the most votes an image may get; None too for a
    cap above ``LARGEST_CAP``.
    """

    radius: float
    in_sigma: float
    fewest_votes: int | None
    typical_votes: float | None
    share: float | None


def radius_costs(procedure: Anytime, sigma: float, tau: float = 0.0) -> list[RadiusCost]:
    """Return the cost of each radius of the grid, lowest first."""
    tables, selection = tabulate(procedure, sigma, tau), procedure.selection_votes
    radii = (0.0, *procedure.radii)
    steps = [b - a for a, b in itertools.pairwise(radii)]
    steps.append(steps[-1] if steps else sigma)  # beyond the last radius as before it
    costs = []
    for level, (radius, step) in enumerate(zip(radii, steps, strict=True)):
        fewest = typical = None
        if level < len(tables.radii):
            fewest = selection + next(v for v, a in zip(tables.looks, tables.accept, strict=True) if v >= a[level])
            if procedure.n <= LARGEST_CAP:
                p = float(special.ndtr((radius + step / 2) / sigma))
                typical = selection + expected_votes(tables, p)
        share = None if typical is None else typical / procedure.max_votes
        costs.append(RadiusCost(radius, radius / sigma, fewest, typical, share))
    return costs


def expected_votes(tables: Tables, p: float) -> float:
    """Return the mean votes, without selection, of an image whose class has probability ``p``.

    The distribution of the votes for the class, by number of radii certified so far, is carried from look to look.
    """
    from scipy import signal  # it takes longer to import than all else of this module

    looks, before, votes = tables.looks, 0, 0.0
    running: dict[int, tuple[int, Floats]] = {0: (0, np.ones(1))}  # level -> fewest hits, and probabilities from there
    for look, accept, give_up in zip(looks, tables.accept, tables.give_up, strict=True):
        votes += (look - before) * sum(float(mass.sum()) for _, mass in running.values())
        least, drawn = _binomial(look - before, p)
        found: dict[int, list[tuple[int, Floats]]] = {}
        for level, (first, mass) in running.items():
            start, grown = first + least, signal.convolve(mass, drawn).clip(0)
            # Levels never fall: hits below accept[level] certify nothing more.
            cuts = [start, *(min(max(a, start), start + len(grown)) for a in accept[level:])]
            for reached, (low, high) in enumerate(itertools.pairwise(cuts), level):
                low = max(low, give_up[reached])
                if high > low:
                    found.setdefault(reached, []).append((low, grown[low - start : high - start]))
        running = {level: joined for level, parts in found.items() if len((joined := _sum(parts))[1])}
        before = look
    return votes


def _binomial(n: int, p: float) -> tuple[int, Floats]:
    """Return the first of the counts whose probability is not negligible, and the probabilities from there."""
    reach = 10 * math.sqrt(n * p * (1 - p)) + 40
    k = np.arange(max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach)) + 1)
    return int(k[0]), np.asarray(stats.binom.pmf(k, n, p), np.float64)


def _sum(parts: list[tuple[int, Floats]]) -> tuple[int, Floats]:
    """Add probabilities that start at different counts; negligible ones at both ends are dropped."""
    first = min(low for low, _ in parts)
    total = np.zeros(max(low + len(mass) for low, mass in parts) - first)
    for low, mass in parts:
        total[low - first : low - first + len(mass)] += mass
    kept = np.flatnonzero(total > NEGLIGIBLE)
    return (first + int(kept[0]), total[kept[0] : kept[-1] + 1]) if len(kept) else (first, total[:0])
