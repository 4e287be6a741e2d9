"""Measure votes saved and accuracy lost by the anytime procedure on the images of Cohen et al. 2019.

    python scripts/savings.py LOGS [--out DIR] [--replicates N]

LOGS holds their released logs as ``cohen-<dataset>-<network>-sigma<sigma>.tsv`` (columns radius and correct). Each
image's probability is recovered from its radius, votes are drawn from it many times, and the procedure's own tables
decide. The loss is relative to the *expected* certified accuracy of fixed n, computed exactly.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bench.smoothing import bounds
from bench.smoothing.anytime import Anytime, Floats, Tables, tabulate
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import Counts, Target

N0, N, ALPHA, STEP = 100, 100_000, 0.001, 0.25
# The logs peak at 3.91 sigma, above the maximum for n = 100,000 at the stated alpha of .001 (3.81): they fit .01.
LOG_ALPHA = 0.01
SEED = 20190208


@dataclass(frozen=True)
class Reference(Anytime):
    """The reference design: the same tests with a constant give-up level."""

    futility: float = 0.05

    def levels(self, looks: Counts) -> Floats:
        """Return the same level at every look."""
        return np.full(len(looks), self.futility)


@dataclass(frozen=True)
class Images:
    """The images of one data set at one sigma, with the probabilities of their top class and label."""

    dataset: str
    sigma: float
    top: Floats
    label: Floats
    right: NDArray[np.bool_]  # the top class is the label


def read(path: Path) -> Images:
    """Recover the probabilities behind one log.

    A certified image has the share of votes whose Clopper-Pearson radius is the one printed. If it is classified
    wrongly, the label gets all other votes, the costliest case. Abstentions are spread below the abstention threshold
    as densely as certified images lie above it (radius < sigma/4), and are right as often as those.
    """
    _, dataset, _, sigma_text = path.stem.split("-")
    sigma = float(sigma_text.removeprefix("sigma"))
    with path.open() as file:
        rows = [(float(row["radius"]) / sigma, row["correct"] == "1") for row in csv.DictReader(file, delimiter="\t")]
    scaled, right = np.array([r for r, _ in rows]), np.array([c for _, c in rows])
    hits = np.arange(N // 2, N + 1)
    lower = np.where(hits < N, special.betaincinv(hits, np.maximum(N - hits + 1, 1), LOG_ALPHA), LOG_ALPHA ** (1 / N))
    top = np.interp(scaled, special.ndtri(lower), hits / N)
    near, abstained = (scaled > 0) & (scaled < 0.25), scaled <= 0
    rank = np.arange(abstained.sum())
    edge = hits[lower > 0.5][0] / N
    top[abstained] = edge - (rank + 0.5) * (special.ndtr(0.25) - 0.5) / near.sum()
    share = right[near].mean()
    right[abstained] = np.floor((rank + 1) * share) > np.floor(rank * share)
    return Images(dataset, sigma, top, np.where(right, top, np.minimum(top, 1 - top)), right)


def grid(sigma: float) -> tuple[float, ...]:
    """Return the radii of the report: multiples of the step that fixed n can certify."""
    return tuple(STEP * k for k in range(1, int(Fixed(N0, N, ALPHA).largest_radius(sigma) / STEP) + 1))


def simulate(tables: Tables, hits: Iterable[Counts], shape: tuple[int, ...]) -> tuple[Counts, Counts]:
    """Return levels reached and votes used, given the votes for the class at each look."""
    level, votes, running = np.zeros(shape, np.int64), np.full(shape, tables.looks[-1]), np.ones(shape, bool)
    for look, accept, give_up, now in zip(tables.looks, tables.accept, tables.give_up, hits, strict=True):
        level = np.where(running, np.maximum(level, np.searchsorted(accept, now, side="right")), level)
        stop = running & ((level == len(accept)) | (now < np.append(give_up, look + 1)[level]))
        votes[stop] = look
        running &= ~stop
    return level, votes


def tested(images: Images, target: str, replicates: int, rng: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the tested class's probability and whether its certificate counts, per replicate and image.

    Selection is between the top class and a single rival with all other votes, the case with most errors.
    """
    shape = (replicates, len(images.top))
    if target == "label":
        return np.broadcast_to(images.label, shape), np.broadcast_to(images.right, shape)
    chosen = (2 * rng.binomial(N0, images.top, shape) > N0) | (images.top < 0.5)
    return np.where(chosen, images.top, 1 - images.top), chosen & images.right


@dataclass(frozen=True)
class Result:
    """Savings, and the loss of certified accuracy at each radius in points with standard errors over replicates."""

    ratio: float
    loss: Floats
    error: Floats


def measure(images: Images, design: Anytime, replicates: int) -> Result:
    """Simulate a design on one set of images; all designs get the same selections."""
    rng = np.random.default_rng([SEED, round(100 * images.sigma)])
    p, counts = tested(images, design.target, replicates, rng)
    tables = tabulate(design, images.sigma)
    steps = np.diff(tables.looks, prepend=0)
    level, votes = simulate(tables, itertools.accumulate(rng.binomial(step, p) for step in steps), p.shape)
    fixed = np.array([special.bdtrc(c - 1, N, p) * counts for c in fixed_counts(tables.p0)])
    anytime = np.array([(level > k) & counts for k in range(len(tables.radii))])
    loss = 100 * (fixed - anytime).mean(axis=2)
    selection = N0 if design.target == "selected" else 0
    ratio = (N + selection) / (votes.mean() + selection)
    return Result(ratio, loss.mean(axis=1), loss.std(axis=1, ddof=1) / math.sqrt(replicates))


def fixed_counts(p0: tuple[float, ...]) -> list[int]:
    """Return the fewest votes with which fixed n certifies each threshold."""
    return [next(h for h in range(int(N * p), N + 1) if bounds.lower_bound(h, N, ALPHA) >= p) for p in p0]


def oracle(images: Images) -> float:
    """Return the savings of a label test that knows p.

    It takes Wald's ln(1/alpha)/KL votes, and none for radii that fixed n would miss.
    """
    tables = tabulate(Anytime(N0, N, ALPHA, grid(images.sigma)), images.sigma)
    votes = np.zeros(len(images.label))
    p = np.minimum(images.label, 1 - 1e-9)
    for p0, needed in zip(tables.p0, fixed_counts(tables.p0), strict=True):
        worth = special.bdtrc(needed - 1, N, images.label) > 0.5
        wald = math.log(1 / ALPHA) / (special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0))
        votes = np.where(worth, np.maximum(votes, np.minimum(wald, N)), votes)
    return N / float(votes.mean())


def mean_ratio(ratios: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def designs(target: Target) -> Iterator[tuple[str, Anytime]]:
    """Yield the reference design and the shipped one."""
    yield "reference", Reference(N0, N, ALPHA, (), target)
    yield "shipped", Anytime(N0, N, ALPHA, (), target)


def table(sets: list[Images], replicates: int) -> None:
    """Print savings and losses: a block per data set, target and design, a line of losses per sigma."""
    for dataset in sorted({images.dataset for images in sets}):
        chosen = [images for images in sets if images.dataset == dataset]
        print(f"{dataset}: oracle (label target) {mean_ratio([oracle(i) for i in chosen]):.1f}x")
        for target in ("label", "selected"):
            for name, design in designs(target):
                results = [measure(i, replace(design, radii=grid(i.sigma)), replicates) for i in chosen]
                worst = max(float(r.loss.max()) for r in results)
                print(f"  {name:9} {target:8} {mean_ratio([r.ratio for r in results]):5.2f}x, worst loss {worst:.2f}")
                for images, r in zip(chosen, results, strict=True):
                    losses = " ".join(f"{x:.2f}" for x in r.loss)
                    print(
                        f"    sigma {images.sigma:<4} {r.ratio:5.2f}x  loss at 0, {STEP}, ...: {losses}"
                        f"  (s.e. at most {r.error.max():.2f})"
                    )


def curve(sets: list[Images], replicates: int, out: Path) -> None:
    """Write votes against loss for a range of futility levels: curve.csv and curve.png."""
    rows: list[tuple[str, str, float, float, float]] = []
    for dataset in sorted({images.dataset for images in sets}):
        chosen = [images for images in sets if images.dataset == dataset]
        for name, design in designs("label"):
            for factor in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0):
                level = design.futility * factor
                varied = [replace(design, radii=grid(i.sigma), futility=level) for i in chosen]
                results = [measure(i, d, replicates) for i, d in zip(chosen, varied, strict=True)]
                worst = max(float(r.loss.max()) for r in results)
                rows.append((dataset, name, level, mean_ratio([r.ratio for r in results]), worst))
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("dataset", "design", "futility", "savings", "worst_loss_points"))
        writer.writerows((d, n, f"{f:g}", f"{s:.3f}", f"{w:.3f}") for d, n, f, s, w in rows)
    draw(rows, out / "curve.png")


def draw(rows: list[tuple[str, str, float, float, float]], path: Path) -> None:
    """Plot the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for dataset, colour in (("cifar10", "C0"), ("imagenet", "C1")):
        for name, style in (("reference", "--"), ("shipped", "-")):
            points = [(worst, 100 / savings) for d, n, _, savings, worst in rows if (d, n) == (dataset, name)]
            axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3, label=f"{dataset}, {name}")
    axes.axvline(0.5, color="grey", lw=0.8)
    axes.set(xlabel="expected loss at the worst radius and sigma (points)", ylabel="votes, % of fixed n")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the logs, print the table and write the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--replicates", type=int, default=400)
    args = parser.parse_args()
    sets = [read(path) for path in sorted(args.logs.glob("cohen-*-sigma*.tsv"))]
    table(sets, args.replicates)
    curve(sets, max(2, args.replicates // 4), args.out)


if __name__ == "__main__":
    main()
