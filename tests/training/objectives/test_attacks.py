"""Attacks: they are the published algorithms, stay within their ball and the pixel range, and raise the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.data.split import Split
from bench.errors import DefenseFault
from bench.interface import Draw, Logits, Schedule, StepDraw
from bench.training import loop, objectives
from bench.training.objectives.attacks import ddn, pgd
from bench.training.objectives.catrs import CATRS
from bench.training.objectives.method import smoothed_loss
from tests.helpers.steps import Scripted
from tests.training.test_loop import DATA, network

ATTACKS = {"pgd": pgd, "ddn": ddn}
BATCH, COPIES, PIXELS, CLASSES = 5, 3, 16, 4


def classifier(seed: int, hidden: int = 8) -> Logits:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(PIXELS, hidden, generator=g, dtype=torch.float64)
    v = torch.randn(hidden, CLASSES, generator=g, dtype=torch.float64)
    return lambda x, d: (x.flatten(1) @ w).tanh() @ v


def batch(seed: int, sigma: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(BATCH, 1, 4, 4, generator=g, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH,), generator=g)
    noise = sigma * torch.randn(COPIES * BATCH, 1, 4, 4, generator=g, dtype=torch.float64)
    return x, y, noise


def soft_loss(f: Logits, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """The loss of the smoothed classifier of each image, one image and one copy at a time."""
    found = []
    for i in range(len(x)):
        p = [f((x[i] + noise[j * len(x) + i])[None], Scripted(0)).softmax(1)[0] for j in range(len(noise) // len(x))]
        found.append(-torch.stack(p).mean(0)[y[i]].log())
    return torch.stack(found)


# The algorithms, written again for one image ---------------------------------------------------------------------


def slope_at(f: Logits, x: Tensor, y: int, noise: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    delta = delta.clone().requires_grad_()
    out = torch.cat([f((x + delta + e)[None], Scripted(0)) for e in noise])
    (-out.softmax(1).mean(0)[y].log()).backward()
    assert delta.grad is not None
    return delta.grad, out.detach()


def ball(delta: Tensor, radius: float) -> Tensor:
    size = float(delta.norm())
    return delta * radius / size if size > radius else delta


def published_pgd(f: Logits, x: Tensor, y: int, noise: Tensor, steps: int, epsilon: float) -> Tensor:
    delta = torch.zeros_like(x)
    for _ in range(steps):
        g, _ = slope_at(f, x, y, noise, delta)
        moved = (x + delta + 2 * epsilon / steps * g / g.norm()).clamp(0, 1)
        delta = ball(moved - x, epsilon)
    return delta


def published_ddn(f: Logits, x: Tensor, y: int, noise: Tensor, steps: int, epsilon: float) -> Tensor:
    delta, best = torch.zeros_like(x), torch.zeros_like(x)
    most = float(torch.maximum(x, 1 - x).norm())
    smallest, norm = most, epsilon
    for i in range(1, steps + 1):
        g, out = slope_at(f, x, y, noise, delta)
        votes = torch.bincount(out.argmax(1), minlength=CLASSES)
        fooled = int(votes.argmax()) != y
        if fooled and float(delta.norm()) < smallest:
            smallest, best = float(delta.norm()), delta.clone()
        delta = delta + (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / steps))) * g / g.norm()
        norm = min(norm * (0.95 if fooled else 1.05), most)
        delta = (x + delta * norm / delta.norm()).clamp(0, 1) - x
    return ball(best, epsilon)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_the_published_algorithm(name: str, seed: int) -> None:
    f, (x, y, noise) = classifier(seed), batch(seed)
    found = ATTACKS[name](f, x, y, noise, Scripted(0.25), steps=6, epsilon=0.7)
    again = {"pgd": published_pgd, "ddn": published_ddn}[name]
    each = noise.view(COPIES, BATCH, 1, 4, 4)
    expected = torch.stack([again(f, x[i], int(y[i]), each[:, i], 6, 0.7) for i in range(BATCH)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_on_a_linear_classifier_pgd_takes_the_shortest_way_to_the_boundary() -> None:
    w = torch.randn(PIXELS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.full((BATCH, 1, 4, 4), 0.5, dtype=torch.float64)
    y, noise = torch.zeros(BATCH, dtype=torch.int64), batch(1)[2]
    found = pgd(lambda z, d: z.flatten(1) @ w, x, y, noise, Scripted(0.25), steps=5, epsilon=0.3)
    way = w[:, 1] - w[:, 0]
    expected = (0.3 * way / way.norm()).view(1, 1, 4, 4).expand_as(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# What any attack must keep ----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from(sorted(ATTACKS)), st.integers(1, 6), st.floats(0.01, 5), st.booleans())
@settings(max_examples=20)
def test_it_stays_in_its_ball_and_in_the_pixel_range(
    seed: int, name: str, steps: int, epsilon: float, edges: bool
) -> None:
    x, y, noise = batch(seed)
    x = x.round() if edges else x
    delta = ATTACKS[name](classifier(seed), x, y, noise, Scripted(0.25), steps=steps, epsilon=epsilon)
    assert float(delta.flatten(1).norm(dim=1).max()) <= epsilon * (1 + 1e-6)
    assert float((x + delta).min()) >= -1e-12
    assert float((x + delta).max()) <= 1 + 1e-12
    assert not delta.requires_grad


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.01, 2))
@settings(max_examples=20)
def test_pgd_raises_the_loss_of_every_image_of_a_linear_classifier(seed: int, steps: int, epsilon: float) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(PIXELS, 2, generator=g, dtype=torch.float64)
    x, y, noise = batch(seed)
    y = y % 2

    def f(z: Tensor, d: Draw) -> Tensor:
        return z.flatten(1) @ w

    delta = pgd(f, x, y, noise, Scripted(0.25), steps=steps, epsilon=epsilon)
    assert bool((soft_loss(f, x + delta, y, noise) > soft_loss(f, x, y, noise)).all())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_without_a_gradient_gets_finite_perturbations(name: str) -> None:
    x, y, noise = batch(0)
    delta = ATTACKS[name](
        lambda z, d: 0 * z.flatten(1)[:, :CLASSES], x, y, noise, Scripted(0.25, rows=y), steps=4, epsilon=1
    )
    assert bool(delta.isfinite().all())
    if name == "pgd":  # a random direction, as released
        assert float(delta.flatten(1).norm(dim=1).min()) > 0


@pytest.mark.parametrize("name", ["smoothadv", "smoothadv-ddn", "smoothmix"])
def test_a_classifier_that_passes_no_gradient_on_is_refused_in_one_line(name: str) -> None:
    f, (x, y, _) = classifier(0), batch(0)
    objective = objectives.make(name, (1, 8, 8), 0.25, "quick")
    with pytest.raises(DefenseFault, match="no gradient of its loss reaches the image") as e:
        objective(lambda z, d: f(z.detach(), d), x, y, Scripted(0.25, *(torch.randn_like(x) for _ in range(2))))
    assert "\n" not in str(e.value)


# Eval mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoothadv", "smoothadv-ddn", "smoothmix", "catrs"])
def test_it_runs_in_eval_mode_and_leaves_statistics_and_gradients_alone(name: str, tmp_path: Path) -> None:
    """The statistics of batch norms see the images of the loss alone; a kept one keeps its own, during all passes."""
    module = nn.Sequential(nn.BatchNorm2d(1), network(), nn.BatchNorm1d(3).requires_grad_(False))
    kept = module[2].get_buffer("running_mean").clone()
    modes: list[tuple[bool, ...]] = []
    objective = objectives.make(name, (1, 8, 8), 0.25, "quick")
    if name == "catrs":
        objective = replace(cast(CATRS, objective), probabilities=torch.full((len(DATA), 3), 1 / 3))
    inside: list[int] = []

    def loss(x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        def logits(z: Tensor, d: Draw) -> Tensor:
            modes.append(tuple(m.training for m in module.modules()))
            out: Tensor = module(z)
            return out

        inside.append(len(modes))
        before = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        found = objective(logits, x, y, draw)
        for p, g in zip(module.parameters(), before, strict=True):
            assert p.grad is g is None or torch.equal(cast(Tensor, p.grad), cast(Tensor, g))
        return found

    job = loop.TrainingJob(DATA, (), 0.25, objective, 0, torch.device("cpu"), tmp_path / "c.pt", lambda *_: None)
    job.train(module, loss, Schedule(epochs=0.5, batch=25))
    of_a_step = len(modes) // len(inside)
    assert objective.cost.attack < objective.cost.forwards
    trained = [m for m in modes if any(m)]
    attacked = [m for m in modes if not any(m)]
    assert len(attacked) == 2 * len(inside)  # two steps of an attack in each
    assert len(trained) == len(modes) - len(attacked) == (of_a_step - 2) * len(inside)
    names = [n for n, _ in module.named_modules()]
    assert all(not m[names.index("2")] and m[names.index("0")] for m in trained)
    assert int(module[0].get_buffer("num_batches_tracked")) == len(trained)
    assert torch.equal(module[2].get_buffer("running_mean"), kept)


def test_the_modes_come_back_after_an_error() -> None:
    module = network()
    module.get_submodule("1").eval()
    before = [m.training for m in module.modules()]
    draw = loop.TrainingDraw(None, 0, 1, torch.arange(2), 0.25, torch.device("cpu"), [module])  # type: ignore[arg-type]

    def fail() -> None:
        with draw.evaluating():
            raise ZeroDivisionError(str([m.training for m in module.modules() if m.training]))

    with pytest.raises(ZeroDivisionError, match=r"^\[\]$"):
        fail()
    assert [m.training for m in module.modules()] == before
    assert any(before) and not all(before)


def test_a_step_knows_its_place_and_its_images(tmp_path: Path) -> None:
    data = Split("train", DATA.images, DATA.labels, 17)
    job = loop.TrainingJob(data, (), 0.25, objectives.clean, 0, torch.device("cpu"), tmp_path / "c.pt", lambda *_: None)
    seen = []
    for step in job.steps(8, 25):
        assert torch.equal(step.x, torch.from_numpy(data.pixels(step.draw.rows.numpy())))
        seen.append(step.draw.done)
    assert seen == [k / 8 for k in range(8)]


def test_the_loss_of_several_copies_is_that_of_their_mean_probability() -> None:
    f, (x, y, noise) = classifier(3), batch(3)
    out = f(x.repeat(COPIES, 1, 1, 1) + noise, Scripted(0))
    found = smoothed_loss(out, y, COPIES)
    assert float(found) == pytest.approx(float(soft_loss(f, x, y, noise).sum()), rel=1e-9)
    assert float(smoothed_loss(1e4 * out, y, COPIES)) < math.inf
    one = smoothed_loss(out[:BATCH], y, 1)
    assert float(one) == pytest.approx(float(F.cross_entropy(out[:BATCH], y, reduction="sum")), rel=1e-9)
