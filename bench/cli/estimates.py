"""Print what ``bench run --dry-run`` estimates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from bench.cli.options import print_table
from bench.process.console import duration
from bench.process.environment import pick_device
from bench.records.shards import Shard
from bench.runs.estimate import Estimate, Estimator
from bench.runs.plan import Plan
from bench.smoothing.expected import LARGEST_CAP, RadiusCost
from bench.text import DASH


def print_estimates(plans: Sequence[Plan], device: str, shard: Shard | None, as_json: bool) -> None:
    """Print a line for each run as it is estimated, the cost of each radius of an anytime run, and the total."""
    estimates = map(Estimator(pick_device(device), shard).estimate, plans)
    if as_json:
        print(json.dumps([asdict(row) for row in estimates], indent=1))
        return
    rows = []
    for row in estimates:
        rows.append(row)
        print(
            f"{row.label}: {row.images} images, {_at_most(row)}{row.votes:,} votes{_of(row.flops_per_vote)}, "
            f"certify {_within(row)} {duration(row.seconds)}, train about {duration(row.train_seconds)}{_step(row)}",
            flush=True,
        )
    for remark in dict.fromkeys(row.objective for row in rows if row.objective):
        print(remark)
    if fewer := [row for row in rows if row.timed_rows < row.block]:
        part = " or ".join(dict.fromkeys(f"{r.timed_rows} of {r.block}" for r in fewer))
        print(
            f"timed on {part} rows of a block in {len(fewer)} of {len(rows)} runs, since a whole block takes long here"
        )
    by_sigma = {row.sigma: row.radii for row in rows if row.radii}
    for sigma, radii in by_sigma.items():
        _print_radii(sigma, radii)
    if by_sigma:
        print(
            "fewest votes: all agree; typical: the mean of an image whose own radius lies half a step of the grid "
            "beyond; both with the selection"
        )
    total = sum(r.seconds + r.train_seconds for r in rows)
    within = "within about" if any(r.at_most for r in rows) else "about"
    most = "at most " if any(r.at_most for r in rows) else ""
    print(
        f"total: {most}{sum(r.votes for r in rows):,} votes, {within} {duration(total)}, "
        "without the training of bases and shared parts"
    )


def _print_radii(sigma: float, radii: Sequence[RadiusCost]) -> None:
    """Print the cost of each radius at one sigma, and what the largest one within reach adds."""
    table = [
        {
            "radius": f"{c.radius:g}",
            "in sigma": f"{c.in_sigma:.3g}",
            "fewest votes": DASH if c.fewest_votes is None else f"{c.fewest_votes:,}",
            "typical votes": DASH if c.typical_votes is None else f"{c.typical_votes:,.0f}",
            "of the most": DASH if c.share is None else f"{c.share:.1%}",
        }
        for c in radii
    ]
    uncomputed = any(c.fewest_votes is not None and c.typical_votes is None for c in radii)
    dash = f"out of reach, or not computed for more than {LARGEST_CAP:,} votes" if uncomputed else "out of reach"
    print(f"votes of an image by its radius, sigma {sigma:g} (a dash: {dash}):")
    print_table(table, "")
    within = [c for c in radii if c.fewest_votes is not None]
    if len(within) > 1:
        top, below = within[-1], within[-2]
        print(
            f"the largest radii cost most: a sure image takes {top.fewest_votes:,} votes up to r = {top.radius:g}, but "
            f"{below.fewest_votes:,} if the grid ends at {below.radius:g}; --radii picks a grid"
        )


def _step(row: Estimate) -> str:
    """Say what a training step costs where it is more than one pass forward and one backward."""
    if row.step_forwards is None or row.step_forwards == row.step_backwards == 1:
        return ""
    return f" ({row.step_forwards} forward and {row.step_backwards} backward passes of an image in a step)"


def _at_most(row: Estimate) -> str:
    return "at most " if row.at_most else ""


def _within(row: Estimate) -> str:
    return "within about" if row.at_most else "about"


def _of(flops: float | None) -> str:
    return "" if flops is None else f" of {flops / 1e9:.3g} GFLOPs"
