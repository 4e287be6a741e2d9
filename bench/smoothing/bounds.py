"""Confidence bounds and radii, always rounded to the safe side.

Follows Cohen et al. 2019 (arXiv 1902.02918): a lower confidence bound on the probability of the top class gives an l2
radius. A certificate is only as true as its last rounding, so lower bounds and radii are rounded down and upper
bounds up. ``SLACK`` covers scipy's error, which the tests measure against mpmath.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from scipy import special

# Bound on the relative error of scipy's beta and normal quantiles. The largest error found against mpmath, up to
# n = 1e7, is below a hundredth of it (tests/smoothing/test_bounds.py).
SLACK = 1e-12


def lower_bound(top_count: int, n: int, alpha: float) -> float:
    """Return the one-sided Clopper-Pearson lower bound at level ``alpha``, rounded down.

    If the true probability were at most this, ``top_count`` or more successes in ``n`` votes would have probability
    at most ``alpha``.
    """
    if not 0 <= top_count <= n or n < 1:
        raise ValueError(f"top_count must be in [0, n] and n at least 1, not {top_count} of {n}")
    if top_count == 0:
        return 0.0
    if top_count == n:  # closed form alpha**(1/n), kept accurate for large n
        p = math.exp(math.log(alpha) / n)
    else:
        p = float(special.betaincinv(top_count, n - top_count + 1, alpha))
    return max(0.0, p * (1 - SLACK))


def interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval for an accuracy; counts may be fractional."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def radius(p_lower: float, sigma: float) -> float:
    """Return the certified l2 radius ``sigma * Phi^-1(p_lower)``, rounded down; 0 if ``p_lower`` <= 1/2."""
    if p_lower <= 0.5:
        return 0.0
    r = sigma * float(special.ndtri(p_lower))
    return max(0.0, r * (1 - SLACK) - SLACK * sigma)


def smallest_n(alpha: float) -> int:
    """Return the fewest votes that can certify an image at level ``alpha``: the first n with alpha**(1/n) > 1/2."""
    n = max(1, math.floor(math.log(alpha) / math.log(0.5)))
    while lower_bound(n, n, alpha) <= 0.5:
        n += 1
    return n


def printed_radius(radius: float, places: int = 3) -> str:
    """Format a certified radius, rounded down so that the printed claim never exceeds the certificate."""
    return _rounded(radius, places, ROUND_FLOOR)


def printed_reach(radius: float, places: int = 3) -> str:
    """Format a radius beyond which nothing can be certified, rounded up."""
    return _rounded(radius, places, ROUND_CEILING)


def _rounded(value: float, places: int, rounding: str) -> str:
    # A Decimal holds a float exactly; records hold radii below 1e30, so 60 digits always suffice.
    unit = Decimal(1).scaleb(-places)
    return f"{Decimal(value).quantize(unit, rounding, Context(prec=60)):f}"
