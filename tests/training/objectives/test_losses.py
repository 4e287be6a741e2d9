"""Losses of the published objectives: values and gradients on random logits, written again from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from bench.interface import Draw, Logits
from bench.training import objectives
from bench.training.objectives import catrs, macer, smoothadv, smoothmix
from bench.training.objectives.attacks import pgd
from bench.training.objectives.method import ramp
from tests.helpers.steps import Scripted, slopes

BATCH, CLASSES = 6, 3
G = torch.Generator().manual_seed(0)
X = torch.rand(BATCH, 1, 4, 4, generator=G, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
W = torch.randn(16, CLASSES, generator=G, dtype=torch.float64)


def noises(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(BATCH, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(count)]


class Answers:
    """A classifier: W of the image in eval mode, as in attacks; otherwise the next of the given logits."""

    def __init__(self, draw: Scripted, *given: Tensor) -> None:
        self.draw, self.given, self.asked = draw, list(given), list[Tensor]()

    def __call__(self, x: Tensor, draw: Draw) -> Tensor:
        if self.draw.inside:
            return x.flatten(1) @ W
        self.asked.append(x.detach())
        return self.given.pop(0)


def random_logits(copies: int, seed: int, scale: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(copies * BATCH, CLASSES, generator=g, dtype=torch.float64)


Array = np.ndarray[Any, np.dtype[np.float64]]


def probabilities(z: Tensor) -> Array:
    """Softmax of the last axis; of logits [copies * BATCH, classes] as [copies, BATCH, classes]."""
    e = np.exp(z.numpy() - z.numpy().max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).reshape(-1, BATCH, z.shape[-1])


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) over the last axis; a class without probability in p counts nothing."""
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(-1)


LABELS = Y.numpy()
EACH = np.arange(BATCH)


def check(
    objective: objectives.TrainingObjective,
    make_draw: Callable[[], Scripted],
    given: list[Tensor],
    expected: Callable[..., float],
) -> Answers:
    """Compare value and gradients, by central differences of the formula."""
    leaves = [z.clone().requires_grad_() for z in given]
    draw = make_draw()
    answers = Answers(draw, *leaves)
    loss = objective(answers, X, Y, draw)
    loss.backward()
    assert answers.given == []
    assert float(loss.detach()) == pytest.approx(expected(*given), rel=1e-8)
    for i, leaf in enumerate(leaves):

        def moved(z: Tensor, i: int = i) -> float:
            return expected(*given[:i], z, *given[i + 1 :])

        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, slopes(moved, given[i]), rtol=1e-5, atol=1e-7)
    return answers


# SmoothAdv --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("kind", [smoothadv.SmoothAdv, smoothadv.SmoothAdvDDN])
def test_smoothadv_is_the_cross_entropy_of_the_attacked_copies(kind: type[smoothadv.SmoothAdv], done: float) -> None:
    objective = kind(4, 3, 0.8, 0.1)
    z = random_logits(3, 1)

    def expected(z: Tensor) -> float:
        return float(-np.log(probabilities(z)[:, EACH, LABELS]).mean())

    answers = check(objective, lambda: Scripted(0.25, *noises(3), done=done), [z], expected)
    noise = 0.25 * torch.cat(noises(3))
    radius = 0.8 * {0.0: 0.1, 0.05: 0.6, 1.0: 1.0}[done]
    delta = kind.attack(lambda x, d: x.flatten(1) @ W, X, Y, noise, Scripted(0.25), steps=4, epsilon=radius)
    torch.testing.assert_close(answers.asked[0], (X + delta).repeat(3, 1, 1, 1) + noise)  # the attack's own noise
    if kind is smoothadv.SmoothAdv:
        assert float(delta.flatten(1).norm(dim=1).max()) == pytest.approx(radius, rel=1e-6)


def test_the_warm_up_is_that_of_the_released_epochs() -> None:
    for epochs in (90, 150):
        for epoch in range(epochs):
            for part in (0, 0.5, 0.999):
                released = min(1.0, (epoch + 1) / 10)
                assert ramp((epoch + part) / epochs, 10 / epochs) == pytest.approx(released)


# MACER ------------------------------------------------------------------------------------------------------------


def macer_of(weight: float, sigma: float, beta: float, gamma: float) -> Callable[[Tensor], float]:
    def loss(z: Tensor) -> float:
        total = -np.log(probabilities(z).mean(0)[EACH, LABELS] + 1e-10).sum()
        hot = probabilities(beta * z).mean(0)
        first = np.sort(hot, axis=1)[:, ::-1]
        margin = norm.ppf(first[:, 0]) - norm.ppf(first[:, 1])
        for i in EACH:
            if hot[i].argmax() == LABELS[i] and math.isfinite(margin[i]) and margin[i] <= gamma:
                total += weight * sigma / 2 * (gamma - margin[i])
        return float(total / BATCH)

    return loss


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("k", "beta", "gamma"), [(4, 1.0, 8.0), (3, 16.0, 8.0), (4, 2.0, 0.5)])
def test_macer_is_the_formula(k: int, beta: float, gamma: float, seed: int) -> None:
    objective = macer.MACER(k, 12.0, beta, gamma, 0.5)
    z = random_logits(k, seed, 1.0)
    expected = macer_of(12.0, 0.25, beta, gamma)
    check(objective, lambda: Scripted(0.25, *noises(k), done=0.5), [z], expected)
    plain = macer_of(0.0, 0.25, beta, gamma)  # before the hinge begins
    check(objective, lambda: Scripted(0.25, *noises(k), done=0.49), [z], plain)


def test_the_hinge_is_that_of_right_finite_and_near_images_alone() -> None:
    """Two copies; images in turn: right and near, wrong, infinite (both copies saturated), right and beyond gamma."""
    sure = [50.0, 0.0, 0.0]
    one = torch.tensor([[1.0, 0, 0], [1, 0, 0], sure, [9.0, 0, 0], [0, 0.5, 0], [0, 0, 0.2]], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 0, 1, 2])
    z = one.repeat(2, 1).requires_grad_()
    objective = macer.MACER(2, 1.0, 1.0, 3.0, 0.0)
    draw = Scripted(2.0, *noises(2))
    loss = objective(lambda x, d: z, X, y, draw)
    loss.backward()
    p = one.softmax(1).numpy()
    first = np.sort(p, axis=1)[:, ::-1]
    margin = norm.ppf(first[:, 0]) - norm.ppf(first[:, 1])
    cross_entropy = -np.log(p[range(6), y] + 1e-10).sum()
    assert margin[3] > 3
    expected = (cross_entropy + sum(3 - margin[i] for i in (0, 4, 5))) / 6
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


@given(st.integers(0, 10**6), st.floats(0.1, 1e3))
@settings(max_examples=15)
def test_macer_is_finite_for_any_confidence(seed: int, scale: float) -> None:
    z = random_logits(4, seed, scale).float().requires_grad_()
    loss = macer.MACER(4, 12.0, 16.0, 8.0, 0.0)(lambda x, d: z, X, Y, Scripted(0.25, *noises(4)))
    loss.backward()
    assert bool(loss.isfinite())
    assert z.grad is not None
    assert bool(z.grad.isfinite().all())


# SmoothMix --------------------------------------------------------------------------------------------------------


def smoothmix_of(eta: float, shares: Tensor) -> Callable[[Tensor, Tensor], float]:
    s = shares.numpy()

    def loss(z: Tensor, mixed: Tensor) -> float:
        p = probabilities(z)
        mean = p.mean(0)
        target = (1 - s) * mean + s / CLASSES
        right = mean.argmax(1) == LABELS
        apart = np.stack([kl(target, q) for q in probabilities(mixed)])
        return float(-np.log(p[:, EACH, LABELS]).mean() + eta * (right * apart).mean())

    return loss


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize(("done", "warm"), [(0.0, 0.1), (1.0, 1.0)])
def test_smoothmix_is_the_formula(done: float, warm: float, one_step: bool) -> None:
    objective = smoothmix.SmoothMix(3, 2, 0.4, 5.0, one_step, 0.1)
    quantile = torch.randn(BATCH, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares = torch.tensor(norm.cdf(quantile)) / 2
    z, mixed = random_logits(2, 1), random_logits(2, 2)
    answers = check(
        objective,
        lambda: Scripted(0.25, *noises(2), quantile, done=done),
        [z, mixed],
        smoothmix_of(5.0 * warm, shares),
    )
    # The images: an adversary of three steps without a ball, and a mixture between it and the start.
    noise = 0.25 * torch.cat(noises(2))
    start = adversary = X
    for i in range(3):
        at = adversary.clone().requires_grad_()
        p = torch.stack([((at + e).flatten(1) @ W).softmax(1) for e in noise.chunk(2)]).mean(0)
        p.gather(1, Y[:, None]).log().sum().neg().backward()
        assert at.grad is not None
        size = at.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        adversary = (adversary + 0.4 * at.grad / (size + 1e-8)).clamp(0, 1)
        if one_step and i == 0:
            way = adversary - X
            size = way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            start = X + way * (warm * 0.4 / size).clamp(max=1)
    torch.testing.assert_close(answers.asked[0], start.repeat(2, 1, 1, 1) + noise, rtol=1e-5, atol=1e-6)
    s = shares.view(-1, 1, 1, 1)
    mixture = (1 - s) * start + s * adversary
    torch.testing.assert_close(answers.asked[1], mixture.repeat(2, 1, 1, 1) + noise, rtol=1e-5, atol=1e-6)


# CAT-RS -----------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([7, 0, 3, 3, 9, 5])
Q = torch.distributions.Dirichlet(torch.ones(CLASSES, dtype=torch.float64)).sample((10,))
Q[0] = torch.tensor([0.0, 1.0, 0.0])  # a sure image


def catrs_of(weight: float, uniform: Tensor, by_q: bool) -> Callable[[Tensor, Tensor], float]:
    def loss(z: Tensor, attacked: Tensor) -> float:
        p, worst, q = probabilities(z), probabilities(attacked), Q[ROWS].numpy()
        m, total = len(p), 0.0
        for i, y in enumerate(LABELS):
            losses = np.sort(-np.log(p[:, i, y]))
            confidence = q[i, y] if by_q else (p[:, i].argmax(1) == y).mean()
            accepted = max(1, int((uniform[i].numpy() < confidence).sum()))
            total += losses[:accepted].sum() / m
            if accepted == m:
                total += weight * max(kl(q[i], worst[j, i]) for j in range(m))
        return float(total / BATCH)

    return loss


@pytest.mark.parametrize("by_q", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_catrs_is_the_formula(by_q: bool, seed: int) -> None:
    m = 4
    objective = catrs.CATRS(m, 2, 0.7, 1.5, 100, by_q, probabilities=Q)
    quantile = torch.randn(BATCH, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    uniform = torch.tensor(norm.cdf(quantile))
    z, attacked = random_logits(m, seed), random_logits(m, seed + 10)
    z[torch.arange(m) * BATCH, 0] += 8  # an image that all copies get right, so that its worst case counts

    def draw() -> Scripted:
        return Scripted(0.25, *noises(m), quantile, rows=ROWS)

    answers = check(objective, draw, [z, attacked], catrs_of(1.5, uniform, by_q))
    noise = 0.25 * torch.cat(noises(m))
    torch.testing.assert_close(answers.asked[0], X.repeat(m, 1, 1, 1) + noise)
    found = answers.asked[1] - X.repeat(m, 1, 1, 1)
    assert not torch.allclose(found, noise, atol=0.01)


@pytest.mark.parametrize(("seed", "steps", "epsilon"), [(0, 1, 0.1), (1, 4, 0.5), (2, 4, 1.0)])
def test_the_attack_of_catrs_keeps_the_mean_of_the_noise_bounds_its_size_and_leads_away_from_q(
    seed: int, steps: int, epsilon: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    noise = 0.5 * torch.randn(2 * BATCH, 1, 4, 4, generator=g, dtype=torch.float64)
    q = Q[ROWS]
    objective = catrs.CATRS(2, steps, epsilon, 1.0, 100, probabilities=Q)
    logits: Logits = lambda x, d: x.flatten(1) @ W  # noqa: E731
    draw = Scripted(0.5, rows=ROWS)
    found = objective._attack(logits, X, q, noise, objectives.Copies(draw, 2), epsilon)
    moved, own = found.flatten(1), noise.flatten(1)
    torch.testing.assert_close(moved.mean(1), own.mean(1), rtol=1e-6, atol=1e-9)
    # As released: the deviation becomes that of the step before its standardisation, times the quotient of the two
    # root mean squares, so it is at most the noise's own root mean square.
    assert bool((moved.std(1, correction=0) <= own.square().mean(1).sqrt() * (1 + 1e-9)).all())

    def apart(e: Tensor) -> float:
        return float(F.kl_div(logits(X.repeat(2, 1, 1, 1) + e, draw).log_softmax(1), q.repeat(2, 1), reduction="sum"))

    assert apart(found) > apart(noise)


def test_epsilon_of_catrs_doubles_late_where_released() -> None:
    late = catrs.RELEASED["ImageNet"][2]
    assert late.by_q
    assert late.doubled_from == pytest.approx(80 / 90)
    small = replace(late, copies=1, steps=1, doubled_from=0.5, probabilities=Q)
    moved = []
    for done in (0.49, 0.5):
        draw = Scripted(0.25, *noises(1), done=done, rows=ROWS)
        answers = Answers(draw, random_logits(1, 0), random_logits(1, 1))
        small(answers, X, Y, draw)
        moved.append(float((answers.asked[1] - answers.asked[0]).flatten(1).norm(dim=1).mean()))
    assert moved[1] > 1.2 * moved[0]


# Constants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("smoothadv", (3, 32, 32), [(10, 4, 1.0, 10 / 150), (10, 8, 1.0, 10 / 150), (10, 2, 2.0, 10 / 150)]),
        ("smoothadv", (1, 28, 28), [(10, 4, 255 / 256, 10 / 90)] * 3),
        ("macer", (3, 32, 32), [(16, 12, 16, 8, 0), (16, 4, 16, 8, 0), (16, 12, 16, 8, 51 / 150)]),
        ("macer", (1, 28, 28), [(16, 16, 16, 8, 31 / 90), (16, 16, 16, 8, 31 / 90), (16, 6, 16, 8, 31 / 90)]),
        ("smoothmix", (3, 32, 32), [(4, 2, a, 5, o, 10 / 150) for a, o in ((0.5, False), (1, True), (2, True))]),
        ("smoothmix", (1, 28, 28), [(steps, 4, 1, 5, False, 10 / 90) for steps in (2, 4, 8)]),
        ("catrs", (3, 32, 32), [(4, 4, 1, w, 10_000, False, 1) for w in (0.5, 1, 2)]),
    ],
)
def test_constants_are_the_released_ones_but_at_quick(
    name: str, shape: tuple[int, ...], expected: list[tuple[float, ...]]
) -> None:
    for sigma, values in zip((0.25, 0.5, 1.0), expected, strict=True):
        found = objectives.make(name, shape, sigma, "paper")
        assert tuple(found.constants().values()) == pytest.approx(values)
        assert objectives.make(name, shape, sigma, "standard") == found
        quick = objectives.make(name, shape, sigma, "quick")
        less = {k for k, v in quick.constants().items() if v != found.constants()[k]}
        assert quick.cost.forwards < found.cost.forwards
        assert less <= {"steps", "copies", "votes"}
        assert "preset quick reduces" in quick.remark
        assert all(f"{k} from {found.constants()[k]:g}" in quick.remark for k in less)
        assert "reduces" not in found.remark


@pytest.mark.parametrize(
    ("name", "distance"),
    [("smoothadv", "epsilon"), ("smoothadv-ddn", "epsilon"), ("smoothmix", "alpha"), ("catrs", "epsilon")],
)
def test_distances_shrink_with_images_smaller_than_the_published_ones(name: str, distance: str) -> None:
    published = objectives.make(name, (1, 28, 28), 0.25, "paper")
    assert "the sides of the images" not in published.remark
    small, large = (objectives.make(name, (1, side, side), 0.25, "paper") for side in (8, 64))
    assert small.constants()[distance] == pytest.approx(8 / 28 * published.constants()[distance])
    assert {k: v for k, v in small.constants().items() if k != distance} == {
        k: v for k, v in published.constants().items() if k != distance
    }
    assert "distances times 8/28, the sides of the images" in small.remark
    assert large.constants() == published.constants()  # sigma, not the side, bounds the radii of larger images


@pytest.mark.parametrize("name", ["macer", "smoothmix"])
def test_constants_that_are_not_released_are_said_to_be_others(name: str) -> None:
    found = objectives.make(name, (3, 224, 224), 0.5, "paper")
    assert found.constants() == objectives.make(name, (3, 32, 32), 0.5, "paper").constants()
    assert "none are released for ImageNet" in found.remark


def test_ddn_has_the_radius_of_its_own_best_certificates_and_else_says_that_its_constants_are_pgds() -> None:
    for sigma in (0.25, 0.5, 1.0):
        found = objectives.make("smoothadv-ddn", (3, 224, 224), sigma, "paper")
        assert found.constants()["epsilon"] == 512 / 256
        assert "PGD" not in found.remark
        for shape in ((1, 28, 28), (3, 32, 32)):
            found, pgds = (objectives.make(name, shape, sigma, "paper") for name in ("smoothadv-ddn", "smoothadv"))
            assert found.constants() == pgds.constants()
            assert "those of PGD, since no commands are released for DDN" in found.remark
            assert "DDN" not in pgds.remark


@pytest.mark.parametrize(
    ("name", "shape", "sigma", "where"),
    [
        ("smoothadv", (3, 32, 32), 0.5, "CIFAR-10 at this noise"),
        ("smoothadv", (3, 32, 32), 0.12, "CIFAR-10 at sigma 0.25"),
        ("smoothmix", (1, 28, 28), 2.0, "MNIST at sigma 1"),
        ("consistency", (3, 32, 32), 0.25, "CIFAR-10 at this noise"),
        ("consistency", (3, 32, 32), 0.4, "CIFAR-10 at sigma 0.5"),
        ("consistency", (3, 224, 224), 0.25, "ImageNet at sigma 0.5"),
    ],
)
def test_a_remark_names_the_noise_that_its_constants_are_published_for(
    name: str, shape: tuple[int, ...], sigma: float, where: str
) -> None:
    assert f"for {where}" in objectives.make(name, shape, sigma, "paper").remark


def test_costs_count_the_passes_of_a_step() -> None:
    """Each objective's cost is what it asks the classifier, and what it differentiates."""
    for name in objectives.OBJECTIVES:
        for preset in ("quick", "paper"):
            objective = objectives.make(name, (1, 4, 4), 0.5, preset)
            if isinstance(objective, catrs.CATRS):
                objective = replace(objective, probabilities=Q)
            forwards = attacked = backwards = 0
            weight = W.clone().requires_grad_()
            draw = Scripted(0.5, *([] if name != "dign" else _dign_script()), rows=ROWS)

            def logits(x: Tensor, d: Draw, w: Tensor = weight, draw: Scripted = draw) -> Tensor:
                nonlocal forwards, attacked, backwards
                forwards += len(x)
                attacked += len(x) if draw.inside else 0
                backwards += len(x)
                return x.flatten(1).double() @ w

            objective(logits, X, Y, draw).backward()
            cost = objective.cost
            assert (forwards, attacked, backwards) == tuple(
                BATCH * n for n in (cost.forwards, cost.attack, cost.backwards)
            ), name


def _dign_script() -> list[Tensor]:
    return [t for e in noises(3) for t in (e[:, :, :1, :1], e)]


def test_pgd_is_the_default_attack() -> None:
    assert smoothadv.SmoothAdv.attack is pgd
