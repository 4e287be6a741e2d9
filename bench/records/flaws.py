"""Defects of released logs: pure functions of a log's rows.

Radii are compared with Cohen et al.'s formula (arXiv 1902.02918) at the given sigma, n and alpha: the largest
possible, those that a count of votes gives, and what rounding when printed may have added.

Records store these texts and ``bench verify`` compares them, so rewording one makes old records fail.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bench.data.sources import SPLIT
from bench.errors import BenchError, unknown
from bench.smoothing import bounds
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import MAX_VOTES, TARGETS

# Images of test splits that have one size everywhere: a log that ends earlier is incomplete.
SIZES = {"mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000, "svhn": 26_032, "imagenet": 50_000}
# How much a radius may differ from the formula's, in sigma, because other libraries round differently.
TOLERANCE = 1e-6
HUGE = 1e30  # no radius, sigma or time is so large; sums of such numbers may overflow
FORMATS = ("cohen", "adaptive")
CHOICES: dict[str, tuple[str, ...]] = {
    "noise": ("float", "grid"),
    "target": TARGETS,
    "split": ("test", "validation", "train"),  # and named test parts, see ``allowed``
}

Floats = NDArray[np.float64]


def allowed(name: str, value: str) -> bool:
    """Return whether a parameter of ``CHOICES`` may have this value."""
    return value in CHOICES[name] or (name == "split" and re.fullmatch(SPLIT, value) is not None)


@dataclass(frozen=True)
class LogParameters:
    """What a log's certificates were made with, as far as a log does not state it."""

    format: str
    dataset: str
    sigma: float
    alpha: float
    n: int
    n0: int | None = None
    radius: float | None = None
    noise: str | None = None  # None, here and below: as the log states, else the first of CHOICES
    target: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no certificate can have been made with. Raises BenchError."""
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) is not None and not allowed(name, value):
                raise unknown(f"--{name}", getattr(self, name), known)
        if not 0 < self.sigma < HUGE:
            raise BenchError(f"--sigma {self.sigma:g}: must be above 0")
        if not 0 < self.alpha < 1:
            raise BenchError(f"--alpha {self.alpha:g}: must lie strictly between 0 and 1")
        if not bounds.smallest_n(self.alpha) <= self.n <= MAX_VOTES:
            least = bounds.smallest_n(self.alpha)
            raise BenchError(
                f"--n {self.n}: no certificate at alpha {self.alpha:g} has as many; n must be {least} to {MAX_VOTES}"
            )
        if self.n0 is not None and not 1 <= self.n0 <= MAX_VOTES:
            raise BenchError(f"--n0 {self.n0}: must be at least 1 and at most {MAX_VOTES:,}")
        if self.radius is not None and (self.format != "adaptive" or not 0 < self.radius < HUGE):
            raise BenchError(f"--radius {self.radius:g}: a number above 0, and only of adaptive logs")

    @property
    def reach(self) -> float:
        """The largest radius that ``n`` unanimous votes can give."""
        return Fixed(self.n0 or 1, self.n, self.alpha).largest_radius(self.sigma)


@dataclass(frozen=True)
class Row:
    """A line of the log for one image; ``predicted`` -1 where it abstains."""

    fields: dict[str, str]
    index: int
    label: int
    predicted: int
    radius: float

    @property
    def values(self) -> tuple[int, int, float]:
        """Label, prediction and radius."""
        return self.label, self.predicted, self.radius


def affected(rows: Sequence[Row]) -> str:
    """Describe how many rows, and which image is the first."""
    return f"{len(rows)} of the rows, image {rows[0].index} first"


def structure(rows: Sequence[Row], parameters: LogParameters, classes: int) -> Iterator[str]:
    """Find missing rows, classes that do not exist, and a wrong column ``correct``."""
    # Validation too, as in records of before other splits could be certified.
    known = SIZES.get(parameters.dataset, 0) if parameters.split in (None, "test", "validation") else 0
    yield from _missing(sorted(r.index for r in rows), known)
    if classes and (beyond := [r for r in rows if max(r.label, r.predicted) >= classes]):
        yield f"classes from {classes} on, of which the data set has {classes}: {affected(beyond)}"
    if not all("correct" in r.fields for r in rows):
        return
    right = [int(r.predicted == r.label) for r in rows]
    given = [r.fields["correct"] for r in rows]
    if given == [str(v) for v in np.cumsum(right)] and given != [str(v) for v in right]:
        yield "column correct is a running total, not 0 or 1"
    elif wrong := [r for r, s, v in zip(rows, given, right, strict=True) if s.lower() not in _TRUTH[v]]:
        numbers = [int(s) if re.fullmatch(r"\d{1,9}", s) else -1 for s in given]
        rising = min(numbers) >= 0 and max(numbers) > 1 and numbers == sorted(numbers)
        kind = "column correct is a running total, and not that of predict == label" if rising else "correct is wrong"
        yield f"{kind}: {affected(wrong)}"


_TRUTH = ({"0", "0.0", "false"}, {"1", "1.0", "true"})


def _missing(indices: Sequence[int], size: int) -> Iterator[str]:
    """Find gaps in indices that run in mostly even steps; a random subset of the images has none."""
    steps = Counter(b - a for a, b in itertools.pairwise(indices))
    if len(indices) < 10:
        return
    ((step, count),) = steps.most_common(1)
    if count < 0.9 * (len(indices) - 1):
        return
    first, end = indices[0] % step, max(size, indices[-1] + 1)
    present = {i for i in indices if i % step == first}
    missing = len(range(first, end, step)) - len(present)
    if missing:
        absent = next(i for i in range(first, end, step) if i not in present)
        yield f"images missing where every {step} of {end:,} are expected: {missing}, image {absent} first"


def abstentions(rows: Sequence[Row]) -> Iterator[str]:
    """Find abstentions with a radius, and predictions with a negative one."""
    if odd := [r for r in rows if r.predicted < 0 and r.radius != 0]:
        yield f"abstentions with a radius, taken as 0: {affected(odd)}"
    if odd := [r for r in rows if r.predicted >= 0 > r.radius]:
        yield f"predictions with a radius below 0, taken as abstentions: {affected(odd)}"


def stopped(row: Row, target: str | None) -> bool:
    """Whether a row says that an image of a wrong class got no votes to bound it, as with target "correct"."""
    return target == "correct" and row.predicted not in (-1, row.label) and row.radius >= 0


def stops(rows: Sequence[Row], target: str | None) -> Iterator[str]:
    """Find wrong predictions with a radius, in a log of target "correct", which tests none."""
    if odd := [r for r in rows if stopped(r, target) and r.radius > 0]:
        yield f"wrong predictions with a radius, which target correct does not test, taken as 0: {affected(odd)}"


def units(rows: Sequence[Row]) -> Floats:
    """Return the last place each radius was printed to; from all radii, since trailing zeros may have been dropped."""
    numbers = [Decimal(r.fields["radius"]) for r in rows]
    digits = max((len(d.as_tuple().digits) for d in numbers), default=0)
    decimals = max((-int(d.as_tuple().exponent) for d in numbers), default=0)
    return np.array([10.0 ** max(-decimals, d.adjusted() - digits + 1) for d in numbers], np.float64)


def support(rows: Sequence[Row], radii: Floats, unit: Floats, parameters: LogParameters) -> Iterator[str]:
    """Find radii that no votes can give, allowing for rounding."""
    least = radii - unit / 2 - TOLERANCE * parameters.sigma
    if len(above := np.flatnonzero(least > parameters.reach)):
        at = int(above[np.argmax(radii[above])])
        alpha = math.exp(parameters.n * float(special.log_ndtr(least[at] / parameters.sigma)))
        fits = f"; alpha {alpha:.2g} would allow it" if alpha < 0.5 else ""
        yield (
            f"radii above {bounds.printed_reach(parameters.reach, 4)}, the largest possible at n {parameters.n:,} "
            f"and alpha {parameters.alpha:g}: {affected([rows[i] for i in above.tolist()])}, the largest "
            f"{float(radii[at])}{fits}"
        )
    shares = [r.fields.get("estimated_pr", "") for r in rows]
    if not rows or not all(re.fullmatch(r"[01](\.\d+)?(e-?\d+)?", s) for s in shares):
        return
    # More votes at the same share only raise the bound, so none gives more than the cap does.
    top = np.clip(np.ceil(np.array(shares, np.float64) * parameters.n - 1e-6), 0, parameters.n)
    if len(above := np.flatnonzero(least > _radii(top, parameters))):
        yield f"radii above what estimated_pr supports: {affected([rows[i] for i in above.tolist()])}"


def _radii(counts: Floats, parameters: LogParameters) -> Floats:
    """Compute sigma Phi^-1 of the Clopper-Pearson bound at those counts of n, -inf for 0; not rounded down."""
    p = special.betaincinv(np.maximum(counts, 1), np.maximum(parameters.n - counts + 1, 1), parameters.alpha)
    return np.asarray(np.where(counts < 1, -np.inf, parameters.sigma * special.ndtri(p)), np.float64)


def counts(rows: Sequence[Row], radii: Floats, unit: Floats, parameters: LogParameters) -> Iterator[str]:
    """Find radii of fixed n that follow from no count of votes, or only when rounded up."""
    slack = TOLERANCE * parameters.sigma
    # The fewest votes that give the radius or more, by bisection of all rows at once.
    low, high = np.zeros(len(rows)), np.full(len(rows), parameters.n + 1.0)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        enough = _radii(np.minimum(middle, parameters.n), parameters) >= radii - slack
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    below = _radii(low, parameters)
    above = np.where(high > parameters.n, np.inf, _radii(np.minimum(high, parameters.n), parameters))
    down = above <= radii + unit + slack
    up = ~down & (radii - below <= unit / 2 + slack)
    if up.any():
        at = int(np.flatnonzero(up)[np.argmax((radii - below)[up])])
        yield (
            f"radii rounded up: {affected([rows[i] for i in np.flatnonzero(up).tolist()])}; image {rows[at].index} has "
            f"{float(radii[at])} where n {parameters.n:,} and alpha {parameters.alpha:g} give "
            f"{bounds.printed_radius(below[at], 6)}"
        )
    within = radii - unit / 2 - slack <= parameters.reach
    if (none := ~down & ~up & within).any():
        odd = [rows[i] for i in np.flatnonzero(none).tolist()]
        settings = f"n {parameters.n:,} and alpha {parameters.alpha:g}"
        yield f"radii that no count of votes gives at {settings}: {affected(odd)}"


def coarse(rows: Sequence[Row], radii: Floats, unit: Floats, sigma: float, grid: Sequence[float]) -> Iterator[str]:
    """Find images that count at a radius of the table only if their own was not rounded up to it."""
    for g in grid:
        near = (radii >= g) & (radii - unit / 2 < g) & (unit > TOLERANCE * sigma)
        if g and near.any():
            odd = [rows[i] for i in np.flatnonzero(near).tolist()]
            yield f"rounded to {unit[near].max():g}, which may decide at radius {g:g}: {affected(odd)}"
