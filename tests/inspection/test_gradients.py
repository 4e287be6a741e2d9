"""Gradients, curvature, alignment and landscape of a linear classifier and a Gaussian's denoiser, in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.inspection import gradients
from bench.inspection.copies import Copies
from bench.inspection.landscape import POINTS, directions, landscape
from bench.inspection.score import Denoiser
from bench.interface import Draw
from bench.smoothing.noise import Noise, Vote

SHAPE, SIGMA = (1, 4, 4), 0.25
RNG = torch.Generator().manual_seed(0)
W = torch.randn(SHAPE, generator=RNG)
MIXED = torch.randn(16, 16, generator=RNG)
COVARIANCE = MIXED @ MIXED.T / 16  # of the clean images, whose mean is 0
COPIES = Copies(torch.rand(SHAPE, generator=RNG), 7, 1, SIGMA, 5, Noise(0, "test"))


def linear(x: Tensor, draw: Draw) -> Tensor:
    """Two classes with the margin w.x: the probability of class 1 is its logistic function."""
    margin = (x * W).flatten(1).sum(1)
    return torch.stack([torch.zeros_like(margin), margin], 1)


def gaussian(x: Tensor, draw: Draw) -> Tensor:
    """Return the mean of the clean images given the noisy ones."""
    best = COVARIANCE @ torch.linalg.inv(COVARIANCE + SIGMA**2 * torch.eye(16))
    return (x.flatten(1) @ best.T).view_as(x)


def half(x: Tensor, draw: Draw) -> Tensor:
    """Denoise images that vary in their upper half alone."""
    return x * torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 4, 1)


def test_a_linear_classifier() -> None:
    found, mean = gradients.measure(linear, COPIES, Denoiser(gaussian, SIGMA, ""))
    margin = (COPIES.noisy * W).flatten(1).sum(1)
    p, norm = margin.sigmoid(), W.norm()
    torch.testing.assert_close(found.loss, -p.log())
    torch.testing.assert_close(found.gradient_norm, (1 - p) * norm)
    torch.testing.assert_close(found.curvature, p * (1 - p) * norm**2, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(mean, -(1 - p).mean() * W)
    score = -(COPIES.noisy.flatten(1) @ torch.linalg.inv(COVARIANCE + SIGMA**2 * torch.eye(16))).view_as(COPIES.noisy)
    torch.testing.assert_close(
        Denoiser(gaussian, SIGMA, "").score(COPIES.noisy, COPIES.draw()), score, rtol=1e-3, atol=1e-3
    )
    cosine = (score * W).flatten(1).sum(1) / (score.flatten(1).norm(dim=1) * norm)
    torch.testing.assert_close(found.score_cosine, cosine, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.score_cosine_sum, cosine, rtol=1e-3, atol=1e-4)


def test_a_step_on_the_manifold_is_the_jacobian_times_noise() -> None:
    denoiser = Denoiser(gaussian, SIGMA, "")
    found, _ = gradients.measure(linear, COPIES, denoiser)
    noise = COPIES.directions()
    on = gaussian(noise, COPIES.draw())  # it is linear, so its Jacobian is itself
    torch.testing.assert_close(denoiser.tangent(COPIES.noisy, noise, COPIES.draw()), on)
    margin = (COPIES.noisy * W).flatten(1).sum(1)
    for direction, change in ((on, found.change_on), (noise - on, found.change_off)):
        step = 2 * SIGMA * (direction * W).flatten(1).sum(1) / direction.flatten(1).norm(dim=1)
        torch.testing.assert_close(
            change, 2 * ((margin + step).sigmoid() - margin.sigmoid()).abs(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("upper", [True, False])
def test_a_classifier_of_one_half_moves_by_steps_in_that_half_alone(upper: bool) -> None:
    def model(x: Tensor, draw: Draw) -> Tensor:
        return linear(x * torch.tensor([upper, upper, not upper, not upper]).view(1, 1, 4, 1), draw)

    found, _ = gradients.measure(model, COPIES, Denoiser(half, SIGMA, ""))
    moved, still = (found.change_on, found.change_off)[:: 1 if upper else -1]
    assert (moved > 1e-3).all() and (still < 1e-6).all()


def test_gradients_that_are_zero_or_missing_give_no_direction() -> None:
    masked, mean = gradients.measure(lambda x, d: linear((4 * x).round() / 4, d), COPIES, Denoiser(half, SIGMA, ""))
    assert (masked.gradient_norm == 0).all() and masked.curvature.isnan().all() and masked.score_cosine.isnan().all()
    assert not landscape(linear, COPIES, mean, 64).gradient
    cut, mean = gradients.measure(lambda x, d: linear(x.detach(), d), COPIES, Denoiser(half, SIGMA, ""))
    assert cut.gradient_norm.isnan().all() and cut.loss.isfinite().all() and cut.change_on.isfinite().all()
    assert not landscape(linear, COPIES, mean, 64).gradient


def test_small_gradients_have_a_direction_too() -> None:
    tiny = torch.full((2, 1, 4, 4), 1e-30)
    torch.testing.assert_close(gradients.unit(tiny).flatten(1).norm(dim=1), torch.ones(2))


def test_the_landscape_of_a_linear_classifier_changes_along_its_gradient_alone() -> None:
    _, mean = gradients.measure(linear, COPIES, Denoiser(half, SIGMA, ""))
    first, second, known = directions(COPIES, mean)
    assert known and abs(float((first * second).sum())) < 1e-6
    torch.testing.assert_close(first, -W / W.norm())
    rows: list[int] = []
    found = landscape(linear, COPIES, mean, 12, lambda: rows.append(1))
    margin = (COPIES.noisy * W).flatten(1).sum(1).double().numpy()
    offsets = np.linspace(-2 * SIGMA, 2 * SIGMA, POINTS)
    expected = np.log1p(np.exp(-(margin[None] - offsets[:, None] * float(W.norm())))).mean(1)
    assert len(rows) == POINTS and np.allclose(found.offsets, offsets)
    assert np.allclose(found.losses, expected[None].repeat(POINTS, 0), atol=1e-5)
    assert np.allclose(landscape(linear, COPIES, mean, 1000).losses, found.losses, atol=1e-6)


def test_copies_have_their_own_noise_and_a_randomised_defense_gets_the_same_draws_at_each_point() -> None:
    other = Copies(COPIES.clean, 8, 1, SIGMA, 5, Noise(0, "test"))
    assert torch.equal(COPIES.noisy, COPIES.noisy) and not torch.equal(COPIES.noisy, other.noisy)
    assert not torch.equal(COPIES.direction(0), COPIES.direction(1))
    for purpose in ("select", "estimate", "check"):  # of a run's votes
        votes = COPIES.noise.normals([Vote(purpose, COPIES.index, i) for i in range(COPIES.count)], W.numel())
        assert not np.allclose(votes.ravel(), ((COPIES.noisy - COPIES.clean) / SIGMA).flatten(), atol=1e-3)
    once, twice = COPIES.draw().normal(3), COPIES.draw(2).normal(3)
    assert torch.equal(twice, torch.cat([once, once]))
    noise = ((COPIES.noisy - COPIES.clean) / SIGMA).flatten()
    assert abs(float(noise.mean())) < 4 / math.sqrt(noise.numel())
