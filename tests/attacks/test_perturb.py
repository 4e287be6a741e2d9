"""Perturbations stay in the ball, in the range and on the grid, and go as far as integers allow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.attacks.perturb import place_float, place_grid, project, reach

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.floats(0.01, 3.0), st.sampled_from([2, 17, 256]), st.sampled_from([1e-9, 0.1, 5.0]))
@settings(max_examples=200)
def test_an_attacked_image_on_the_grid_is_inside(seed: int, radius: float, levels: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, levels, (3, 4, 5)).astype(np.uint8)
    placed = place_grid(pixels, (scale * rng.standard_normal((3, 4, 5))).astype(np.float32), radius, levels)
    moved = placed.image.astype(int) - pixels
    assert placed.image.dtype == pixels.dtype and placed.image.max() < levels
    exact = np.sqrt(np.sum(moved**2)) / (levels - 1)
    assert exact <= placed.distance <= radius
    assert placed.distance == pytest.approx(exact, rel=1e-12)


@given(SEEDS, st.floats(0.001, 5.0), st.floats(0.1, 10.0))
@settings(max_examples=200)
def test_an_attacked_float_image_is_inside(seed: int, radius: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random((3, 4, 5), np.float32)
    delta = project(torch.from_numpy(x), torch.from_numpy(scale * rng.standard_normal((3, 4, 5), np.float32)), radius)
    placed = place_float(x, delta.numpy(), radius)
    assert placed.image.dtype == np.float32 and placed.image.min() >= 0 and placed.image.max() <= 1
    exact = np.sqrt(np.sum((placed.image.astype(np.float64) - x) ** 2))
    assert exact <= placed.distance <= radius
    # Rounding to float32 costs next to nothing of the ball.
    assert placed.distance >= min(radius, float(torch.linalg.vector_norm(delta))) - 1e-5


@given(SEEDS, st.sampled_from([1.0, 2.0, 3.0, 5.0]))
@settings(max_examples=60)
def test_integer_moves_are_close_to_the_best(seed: int, radius: float) -> None:
    """Against the best of all integer moves of three pixels; the greedy fill may miss part of a single step."""
    rng = np.random.default_rng(seed)
    wanted = rng.standard_normal(3)
    pixels = np.full((1, 1, 3), 8, np.uint8)
    placed = place_grid(pixels, wanted.reshape(1, 1, 3).astype(np.float32), radius / 16, 17)
    inside = [m for m in itertools.product(range(-5, 6), repeat=3) if sum(v * v for v in m) <= radius**2]
    best = max(float(np.dot(m, wanted)) for m in inside)
    gained = float(np.dot(placed.image.astype(int).reshape(-1) - 8, wanted))
    assert best - np.abs(wanted).max() <= gained <= best + 1e-9


def test_equal_wishes_move_as_many_pixels_as_the_ball_allows() -> None:
    """Rounding alone moves all pixels or none; single steps fill the ball: 16 of 64 at r = 4 steps."""
    placed = place_grid(np.full((1, 8, 8), 8, np.uint8), np.full((1, 8, 8), 0.1, np.float32), 4.0001 / 16, 17)
    assert (placed.image != 8).sum() == 16 and placed.distance == pytest.approx(0.25)


def test_the_ball_may_hold_every_image() -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    corner = torch.where(x < 0.5, 1.0, 0.0)
    far = project(x, 100 * (corner - x), reach(x) + 1e-4)
    assert torch.allclose(x + far, corner, atol=1e-6)
    pixels = np.array([[[0, 3, 16]]], np.uint8)
    placed = place_grid(pixels, np.array([[[-9.0, -9.0, 9.0]]], np.float32), 10.0, 17)
    assert placed.image.tolist() == [[[0, 0, 16]]]


def test_no_wish_changes_nothing() -> None:
    pixels = np.array([[[0, 3, 16]]], np.uint8)
    placed = place_grid(pixels, np.zeros((1, 1, 3), np.float32), 10.0, 17)
    assert placed.distance == 0 and (placed.image == pixels).all()
