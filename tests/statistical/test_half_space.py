"""The whole engine against a classifier whose certified radius is known in closed form.

For a half-space w.x = b the smoothed classifier's true radius at x is |w.x - b| / |w|, whatever
sigma (Cohen et al. 2019, appendix B). A certificate above it is false, which may happen with
probability alpha per image.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from bench.interface import Draw
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.noise import Noise
from bench.smoothing.rows import add_float
from bench.smoothing.task import Task
from bench.smoothing.votes import Certificate

SHAPE = (1, 8, 8)
SIGMA = 0.5
# The mean pixel against a threshold: |w| = 1/8 for 64 pixels, so the radius is 8 |mean - threshold|.
THRESHOLD = 0.5


def half_space(x: Tensor, draw: Draw) -> Tensor:
    side = x.flatten(1).mean(1) - THRESHOLD
    return torch.stack([-side, side], 1)


def run(radii: np.ndarray, n: int, alpha: float, n0: int = 32, seed: int = 0) -> list[Certificate]:
    """Certify images whose true radii are given."""
    pixels = (THRESHOLD + radii / 8)[:, None, None, None].astype(np.float32) * np.ones(SHAPE, np.float32)
    noise = Noise(seed, "test")
    noisy = add_float(noise, SIGMA)
    task = Task(lambda i: pixels[i], lambda i: 1, noisy, SHAPE, 2, SIGMA, noise, 256, torch.device("cpu"))
    with torch.inference_mode():
        found = list(
            certify(
                [Device(task, [half_space])], lambda label: Fixed(n0, n, alpha).certify(SIGMA, label), range(len(radii))
            )
        )
    return sorted(found, key=lambda c: c.index)


def test_false_certificates_are_no_more_frequent_than_alpha() -> None:
    """400 images at alpha .1: at most 64 false certificates.

    Were every image's chance exactly .1, P(Bin(400, .1) > 64) = 8e-5: the test's false-alarm rate, for a
    random seed.
    """
    alpha, images, allowed = 0.1, 400, 64
    assert stats.binom.sf(allowed, images, alpha) < 1e-4
    radii = np.full(images, 0.5)
    found = run(radii, 500, alpha)
    false = sum(c.predicted == 1 and c.radius > 0.5 for c in found) + sum(c.predicted == 0 for c in found)
    assert false <= allowed
    # The bound is not too conservative: a one-sided bound at alpha should fail at close to alpha.
    assert false >= stats.binom.ppf(1e-4, images, 0.06)


def test_radii_approach_the_truth_from_below_as_n_grows() -> None:
    radii = np.linspace(0.1, 0.9, 8)
    gaps = []
    for n in (100, 1000, 10_000):
        found = run(radii, n, 0.001)
        gaps.append(np.mean([r - c.radius for r, c in zip(radii, found, strict=True)]))
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.03


def test_counts_of_different_images_are_independent() -> None:
    """300 images of the same p: the spread of their counts is binomial.

    Shared noise would make it far too small, reused votes too large; both tails at 1e-6.
    """
    n, true = 256, 0.25
    p = stats.norm.cdf(true / SIGMA)
    counts = np.array([c.top_count for c in run(np.full(300, true), n, 0.001, n0=128) if c.top_count > n / 2])
    assert len(counts) == 300  # the class is selected wrongly with a chance of about 3e-6 an image
    chi2 = (((counts - n * p) ** 2) / (n * p * (1 - p))).sum()
    assert 1e-6 < stats.chi2.cdf(chi2, len(counts)) < 1 - 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_counts_agree_with_the_exact_probability(seed: int) -> None:
    """Pooled over images, a binomial test at 1e-6 against Phi(r / sigma)."""
    radii = np.full(40, 0.4)
    counts = [c.top_count for c in run(radii, 1000, 0.001, seed=seed) if c.top_count > 500]
    p = float(stats.norm.cdf(0.4 / SIGMA))
    assert stats.binomtest(sum(counts), 1000 * len(counts), p).pvalue > 1e-6
