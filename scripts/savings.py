"""Measure votes saved and accuracy lost by the anytime procedure on the images of released logs.

    python scripts/savings.py LOGS [--out DIR] [--replicates N]

LOGS holds logs of fixed n (columns radius and correct), named ``cohen-<dataset>-<network>-sigma<sigma>.tsv`` (those of
Cohen et al. 2019) or ``<dataset>-<method>-sigma<sigma>.tsv``. Each image's probability is recovered from its radius,
votes are drawn from it many times, and the procedure's own tables decide. The loss compares with what fixed n
certifies on the same votes, drawn on to the cap. Writes table.txt, curve.csv and curve.png.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bench.smoothing import bounds
from bench.smoothing.anytime import Anytime, Floats, Tables, tabulate
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import Counts

N0, N, ALPHA, STEP = 100, 100_000, 0.001, 0.25
# The logs state neither n nor alpha. n = 100,000 is what their authors state. A radius above the largest possible at
# the first alpha shows that a group of logs was made at the next. Radii are printed to three digits: .5% at worst.
LOG_ALPHAS, PRINTED = (0.001, 0.01), 1.005
SEED = 20190208
TARGETS = ("label", "selected", "correct")
# As of certbench 0.2.0, and as shipped.
VILLE = Anytime(N0, N, ALPHA, (), calibration="ville", futility=0.18)
DESIGNS = {"ville": VILLE, "exact": Anytime(N0, N, ALPHA, ())}


@dataclass(frozen=True)
class Images:
    """The images of one log, with the probabilities of their top class and label."""

    group: str  # the logs of one method on one data set
    sigma: float
    alpha: float  # of the log
    peak: float  # its largest radius / sigma
    top: Floats
    label: Floats
    right: NDArray[np.bool_]  # the top class is the label


def read(folder: Path) -> list[Images]:
    """Read all logs of a folder, those of a group together: they were made at one alpha."""
    groups: dict[str, list[Path]] = {}
    for path in folder.glob("*-sigma*.tsv"):
        groups.setdefault(path.stem.rsplit("-sigma", 1)[0], []).append(path)
    sets = []
    for group, paths in sorted(groups.items()):
        rows = {path: scaled(path) for path in paths}
        peak = max(float(radii.max()) for _, radii, _ in rows.values())
        fits = [a for a in LOG_ALPHAS if peak <= PRINTED * Fixed(N0, N, a).largest_radius(1.0)]
        if not fits:
            raise SystemExit(
                f"{group}: a radius of {peak:.3f} sigma is impossible at n = {N:,}, alpha {LOG_ALPHAS[-1]}"
            )
        sets += sorted((recover(group, fits[0], *row) for row in rows.values()), key=lambda i: i.sigma)
    return sets


def scaled(path: Path) -> tuple[float, Floats, NDArray[np.bool_]]:
    """Return the sigma of a log, its radii / sigma and which images are right."""
    sigma = float(path.stem.rsplit("-sigma", 1)[1])
    with path.open() as file:
        rows = [(float(row["radius"]) / sigma, row["correct"] == "1") for row in csv.DictReader(file, delimiter="\t")]
    return sigma, np.array([r for r, _ in rows]), np.array([c for _, c in rows])


def recover(group: str, alpha: float, sigma: float, radii: Floats, right: NDArray[np.bool_]) -> Images:
    """Recover the probabilities behind one log.

    A certified image has the share of votes whose Clopper-Pearson radius is the one printed. If it is classified
    wrongly, the label gets all other votes, the costliest case. Abstentions are spread below the abstention threshold
    as densely as certified images lie above it (radius < sigma/4), and are right as often as those.
    """
    hits = np.arange(N // 2, N + 1)
    lower = np.where(hits < N, special.betaincinv(hits, np.maximum(N - hits + 1, 1), alpha), alpha ** (1 / N))
    top = np.interp(radii, special.ndtri(lower), hits / N)
    near, abstained = (radii > 0) & (radii < 0.25), radii <= 0
    rank = np.arange(abstained.sum())
    edge = hits[lower > 0.5][0] / N
    top[abstained] = edge - (rank + 0.5) * (special.ndtr(0.25) - 0.5) / near.sum()
    share = right[near].mean()
    right[abstained] = np.floor((rank + 1) * share) > np.floor(rank * share)
    return Images(group, sigma, alpha, float(radii.max()), top, np.where(right, top, np.minimum(top, 1 - top)), right)


def grid(sigma: float, n: int = N, most: float = math.inf) -> tuple[float, ...]:
    """Return the radii of the report: multiples of the step that fixed n can certify, up to ``most`` sigma."""
    largest = min(Fixed(N0, n, ALPHA).largest_radius(sigma), most * sigma)
    return tuple(STEP * k for k in range(1, int(largest / STEP) + 1))


def simulate(tables: Tables, draw: Callable[[int, Counts], Counts], images: int) -> tuple[Counts, Counts, Counts]:
    """Return levels reached, votes used and votes for the class then.

    ``draw`` returns votes for the class among some more, for the images with these numbers.
    """
    level, votes, final = (np.zeros(images, np.int64) for _ in range(3))
    running, hits, before = np.arange(images), np.zeros(images, np.int64), 0
    for look, accept, give_up in zip(tables.looks, tables.accept, tables.give_up, strict=True):
        hits, before = hits + draw(look - before, running), look
        level[running] = np.maximum(level[running], np.searchsorted(accept, hits, side="right"))
        reached = level[running]
        stop = (reached == len(accept)) | (hits < np.append(give_up, look + 1)[reached]) | (look == tables.looks[-1])
        votes[running[stop]], final[running[stop]] = look, hits[stop]
        running, hits = running[~stop], hits[~stop]
    return level, votes, final


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


def measure(images: Images, design: Anytime, target: str, drawn: int) -> Result:
    """Simulate a design on one log, ``drawn`` images in all (each at least twice).

    Target "correct" stops after selection where the class is not the label: the image counts as nothing.
    """
    replicates, n = max(2, round(drawn / len(images.top))), design.n
    rng = np.random.default_rng([SEED, round(100 * images.sigma)])
    p, counts = (x.ravel() for x in tested(images, target, replicates, rng))
    on = np.flatnonzero(counts) if target == "correct" else np.arange(len(p))
    p, tables = p[on], tabulate(design, images.sigma)
    level, votes, hits = simulate(tables, lambda step, which: rng.binomial(step, p[which]), len(p))
    hits = hits + rng.binomial(n - votes, p)
    lost = np.zeros((len(tables.radii), len(counts)))
    for k, fewest in enumerate(fixed_counts(n, tables.p0)):
        lost[k, on] = counts[on] * ((hits >= fewest).astype(float) - (level > k))
    loss = 100 * lost.reshape(len(lost), replicates, -1).mean(axis=2)
    selection = 0 if target == "label" else N0
    ratio = (n + selection) / (votes.sum() / len(counts) + selection)
    return Result(ratio, loss.mean(axis=1), loss.std(axis=1, ddof=1) / math.sqrt(replicates))


@cache
def fixed_counts(n: int, p0: tuple[float, ...]) -> list[int]:
    """Return the fewest votes with which fixed n certifies each threshold."""
    return [next(h for h in range(int(n * p), n + 1) if bounds.lower_bound(h, n, ALPHA) >= p) for p in p0]


def oracle(images: Images) -> float:
    """Return the savings of a label test that knows p.

    It takes Wald's ln(1/alpha)/KL votes, and none for radii that fixed n would miss.
    """
    p0s = tabulate(replace(VILLE, radii=grid(images.sigma)), images.sigma).p0
    votes = np.zeros(len(images.label))
    p = np.minimum(images.label, 1 - 1e-9)
    for p0, needed in zip(p0s, fixed_counts(N, p0s), strict=True):
        worth = special.bdtrc(needed - 1, N, images.label) > 0.5
        wald = math.log(1 / ALPHA) / (special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0))
        votes = np.where(worth, np.maximum(votes, np.minimum(wald, N)), votes)
    return N / float(votes.mean())


def mean_ratio(ratios: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def results(
    sets: list[Images], design: Anytime, target: str, drawn: int, most: float = math.inf
) -> Iterator[tuple[Images, Result]]:
    """Measure a design on several logs with the grid of each, up to ``most`` sigma."""
    for images in sets:
        made = replace(design, radii=grid(images.sigma, design.n, most))
        yield images, measure(images, made, target, drawn)


def line(name: str, found: list[tuple[Images, Result]]) -> str:
    """Return one line of the table: savings over the sigmas, worst loss and standard error at each sigma."""
    savings = mean_ratio([r.ratio for _, r in found])
    worst = " / ".join(f"{r.loss.max():.2f}" for _, r in found)
    error = max(float(r.error.max()) for _, r in found)
    each = " / ".join(f"{r.ratio:.1f}" for _, r in found)
    return f"  {name:28} {savings:6.2f}x ({each}), worst loss {worst} (s.e. at most {error:.2f})"


def table(sets: list[Images], drawn: int) -> Iterator[str]:
    """Yield the lines of the table: a block for each group of logs."""
    yield f"Votes saved: geometric mean over sigmas (each sigma). Cap {N:,} and every radius where not stated."
    for group in sorted({images.group for images in sets}):
        chosen = [images for images in sets if images.group == group]
        sizes = " / ".join(f"{len(i.top):,}" for i in chosen)
        sigmas = " / ".join(f"{i.sigma:g}" for i in chosen)
        peaks = " / ".join(f"{i.peak:.3f}" for i in chosen)
        yield f"{group}: sigma {sigmas}; {sizes} images; largest radius {peaks} sigma, so alpha {chosen[0].alpha:g}"
        yield f"  oracle that knows p, label   {mean_ratio([oracle(i) for i in chosen]):6.2f}x"
        for target in TARGETS:
            for name, design in DESIGNS.items():
                yield line(f"{name}, {target}", list(results(chosen, design, target, drawn)))
        design = DESIGNS["exact"]
        for target in ("label", "correct"):
            for most in (3.0, 2.5):
                yield line(f"exact, {target}, to {most:g} sigma", list(results(chosen, design, target, drawn, most)))
        for target in ("selected", "correct"):
            for name, design in DESIGNS.items():
                found = list(results(chosen, replace(design, n=10_000), target, drawn))
                yield line(f"{name}, {target}, cap 10,000", found)


def curve(sets: list[Images], drawn: int, out: Path) -> None:
    """Write votes against loss for a range of futility levels, on the logs of Cohen et al.: curve.csv and curve.png."""
    rows: list[tuple[str, str, float, float, float]] = []
    for group in sorted({images.group for images in sets if images.group.startswith("cohen-")}):
        chosen = [images for images in sets if images.group == group]
        for name, design in DESIGNS.items():
            for factor in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0):
                level = design.futility * factor
                found = [r for _, r in results(chosen, replace(design, futility=level), "label", drawn)]
                worst = max(float(r.loss.max()) for r in found)
                rows.append((group, name, level, mean_ratio([r.ratio for r in found]), worst))
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("logs", "design", "futility", "savings", "worst_loss_points"))
        writer.writerows((d, n, f"{f:g}", f"{s:.3f}", f"{w:.3f}") for d, n, f, s, w in rows)
    draw(rows, out / "curve.png")


def draw(rows: list[tuple[str, str, float, float, float]], path: Path) -> None:
    """Plot the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(dict.fromkeys(row[0] for row in rows)):
        for name, style in (("ville", "--"), ("exact", "-")):
            points = [(worst, 100 / savings) for g, n, _, savings, worst in rows if (g, n) == (group, name)]
            axes.plot(*zip(*points, strict=True), style, color=f"C{number}", marker="o", ms=3, label=f"{group}, {name}")
    axes.axvline(0.5, color="grey", lw=0.8)
    axes.set(xlabel="expected loss at the worst radius and sigma (points)", ylabel="votes, % of fixed n")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the logs, and write the table and the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--replicates", type=int, default=200, help="of a log of 500 images; fewer of larger logs")
    args = parser.parse_args()
    sets = read(args.logs)
    with (args.out / "table.txt").open("w") as file:
        for text in table(sets, 500 * args.replicates):
            print(text, flush=True)
            file.write(text + "\n")
    curve(sets, 500 * args.replicates, args.out)


if __name__ == "__main__":
    main()
