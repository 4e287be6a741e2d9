"""The budgets of attacks, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What is spent on each image and radius."""

    images: int | None  # None: all images of the run
    steps: int  # of PGD
    draws: int  # noise draws of a step
    restarts: int  # the first from the clean image, the others from random ones
    query_steps: int
    query_pairs: int  # pairs of noise draws of a step of the query attack
    n: int  # votes of a decision, at most those of the run


# Published: Salman et al. 2019 (arXiv 1906.04584) attack with 20 steps of 32 draws from the clean image, and decide by
# 1,000 votes at alpha .001 (predict.py and README of the release); their gradient-free estimate, which the query attack
# uses, has no published budget. AutoAttack (Croce and Hein 2020) averages 20 draws in its version for randomized
# defenses. Restarts, pairs of draws and the 10,000 votes of ``paper`` are ours.
PRESETS = {
    "quick": Budget(images=50, steps=10, draws=8, restarts=1, query_steps=10, query_pairs=32, n=500),
    "standard": Budget(images=200, steps=20, draws=32, restarts=2, query_steps=20, query_pairs=128, n=1_000),
    "paper": Budget(images=None, steps=20, draws=32, restarts=5, query_steps=20, query_pairs=512, n=10_000),
}
RANDOM = 10  # random perturbations, of which the best is decided
