"""Objectives: their formulas compared with plain computations, and a table row for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.data.datasets import load_card
from bench.interface import Draw
from bench.training import objectives
from tests.helpers.commands import TINY, Result, defense


class Scripted:
    """A draw whose noise is given."""

    def __init__(self, sigma: float, *noise: Tensor) -> None:
        self.sigma, self.noise = sigma, list(noise)

        self.done, self.rows = 0.0, torch.arange(6)

    def normal(self, *shape: int) -> Tensor:
        return self.noise.pop(0)

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()


torch.manual_seed(0)
X, Y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
E1, E2 = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
SHARES = [torch.randn(6, 1, 1, 1) for _ in range(3)]
NOISES = [torch.randn(6, 1, 2, 2) for _ in range(3)]
DIGN_SCRIPT = [t for pair in zip(SHARES, NOISES, strict=True) for t in pair]
W = torch.randn(4, 3)


def logits(x: Tensor, draw: Draw) -> Tensor:
    return x.flatten(1) @ W


# Values and gradients, from random logits -------------------------------------------------------------------------
# Written again in numpy from the papers and the released code. z holds the logits of each copy, [copies, 6, 3].

Array = np.ndarray[Any, np.dtype[np.float64]]


def softmax(z: Array) -> Array:
    e = np.exp(z)
    return e / e.sum(1, keepdims=True)


def ce(z: Array) -> float:
    return float(-np.log(softmax(z)[range(6), Y.numpy()]).mean())


def kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


def gaussian_of(z: Array) -> float:
    return ce(z[0])


def stability_of(z: Array) -> float:
    return ce(z[0]) + 2 * float(-(softmax(z[0]) * np.log(softmax(z[1]))).sum(1).mean())


def consistency_of(weight: float, eta: float) -> Callable[[Array], float]:
    def loss(z: Array) -> float:
        a, b = softmax(z[0]), softmax(z[1])
        mean = (a + b) / 2
        entropy = float(-(mean * np.log(mean)).sum(1).mean())
        return (ce(z[0]) + ce(z[1])) / 2 + weight * (kl(mean, a) + kl(mean, b)) / 2 + eta * entropy

    return loss


def dign_of(z: Array) -> float:
    return ce(z[0]) + 0.2 * sum(kl(softmax(z[0]), softmax(k)) for k in z[1:]) / 3


def slopes(f: Callable[[Array], float], z: Array) -> Array:
    """Differentiate by central differences."""
    found = np.zeros_like(z)
    for i in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[i] = 1e-5
        found[i] = (f(z + step) - f(z - step)) / 2e-5
    return found


WEIGHTS = [(0.12, 10.0), (0.25, 10.0), (0.5, 5.0), (1.0, 5.0)]  # of grey images
VALUES: list[tuple[str, float, int, Callable[[Array], float]]] = [
    ("gaussian", 0.5, 1, gaussian_of),
    ("stability", 0.5, 2, stability_of),
    *(("consistency", sigma, 2, consistency_of(weight, 0.5)) for sigma, weight in WEIGHTS),
    ("dign", 0.5, 4, dign_of),
]


@pytest.mark.parametrize(("name", "sigma", "copies", "expected"), VALUES)
def test_value_and_gradient_are_those_of_the_formula(
    name: str, sigma: float, copies: int, expected: Callable[[Array], float]
) -> None:
    z = 2 * torch.randn(copies * 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z.requires_grad_()
    given = 0

    def answer(x: Tensor, draw: Draw) -> Tensor:
        nonlocal given
        given += len(x)
        return z[given - len(x) : given]

    script = DIGN_SCRIPT if name == "dign" else [E1, E2]
    loss = objectives.make(name, X.shape[1:], sigma, "quick")(answer, X, Y, Scripted(sigma, *script))
    loss.backward()
    assert given == len(z)
    assert z.grad is not None
    per_copy = z.detach().numpy().reshape(copies, 6, 3)
    assert loss.item() == pytest.approx(expected(per_copy), rel=1e-6)
    assert z.grad.numpy().reshape(copies, 6, 3) == pytest.approx(slopes(expected, per_copy), rel=1e-5, abs=1e-8)


# The images it asks about -----------------------------------------------------------------------------------------


def asked(name: str, sigma: float, *noise: Tensor) -> list[Tensor]:
    """Return the batches that an objective passes to the classifier."""
    seen: list[Tensor] = []

    def record(x: Tensor, draw: Draw) -> Tensor:
        seen.append(x)
        return logits(x, draw)

    objectives.make(name, X.shape[1:], sigma, "quick")(record, X, Y, Scripted(sigma, *noise))
    return seen


def test_noise_has_the_level_of_training() -> None:
    for name, batches in {
        "gaussian": [X + 0.5 * E1],
        "stability": [X, X + 0.5 * E1],
        "consistency": [torch.cat([X + 0.5 * E1, X + 0.5 * E2])],
        "dign": [X, *(X + 0.5 * torch.special.ndtr(s) * e for s, e in zip(SHARES, NOISES, strict=True))],
    }.items():
        script = DIGN_SCRIPT if name == "dign" else [E1, E2]
        for found, expected in zip(asked(name, 0.5, *script), batches, strict=True):
            torch.testing.assert_close(found, expected)


def test_batch_norm_sees_both_copies_of_consistency_together() -> None:
    norm = nn.BatchNorm2d(1, momentum=1.0)
    objectives.consistency(lambda x, d: norm(x).flatten(1) @ W, X, Y, Scripted(0.5, E1, E2))
    both = torch.cat([X + 0.5 * E1, X + 0.5 * E2])
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, both.mean().view(1))
    assert int(norm.num_batches_tracked or 0) == 1


def test_a_randomised_defense_draws_for_each_row_of_both_copies() -> None:
    own = [torch.randn(6, 2), torch.randn(6, 2)]
    drawn: list[Tensor] = []

    def answer(x: Tensor, draw: Draw) -> Tensor:
        assert draw.sigma == 0.5
        drawn.append(draw.normal(2))
        return logits(x, draw)

    objectives.consistency(answer, X, Y, Scripted(0.5, E1, E2, *own))
    assert torch.equal(drawn[0], torch.cat(own))


@pytest.mark.parametrize(
    ("card", "weights"),
    [
        ("digits", {0.12: (10, 0.5), 0.25: (10, 0.5), 0.5: (5, 0.5), 1.0: (5, 0.5)}),
        ("cifar10", {0.12: (20, 0.5), 0.25: (20, 0.5), 0.5: (10, 0.5), 1.0: (10, 0.5)}),
        ("imagenet", {0.25: (5, 0.5), 0.5: (5, 0.5), 1.0: (5, 0.1)}),
    ],
)
def test_the_cards_shape_decides_the_weights_of_consistency(
    card: str, weights: dict[float, tuple[float, float]]
) -> None:
    shape = load_card(card).shape
    for sigma, expected in weights.items():
        assert objectives.consistency_constants(shape, sigma) == expected


def test_consistency_takes_the_weights_of_its_images() -> None:
    colour = torch.rand(6, 3, 2, 2)
    e = [torch.randn(6, 3, 2, 2) for _ in range(2)]
    w = torch.randn(12, 3)
    found = objectives.consistency(lambda x, d: x.flatten(1) @ w, colour, Y, Scripted(0.25, *e))
    z = np.stack([((colour + 0.25 * n).flatten(1) @ w).numpy() for n in e]).astype(np.float64)
    assert float(found) == pytest.approx(consistency_of(20.0, 0.5)(z), rel=1e-4)


def test_digns_noise_is_the_released_one_after_normalisation() -> None:
    """A level of .2 on images normalised by a deviation of .2 is a training noise of .04 in pixels."""
    mean, std, level = 0.5, 0.2, 0.2
    net = nn.Linear(4, 3)
    found = objectives.dign(lambda x, d: net(((x - mean) / std).flatten(1)), X, Y, Scripted(level * std, *DIGN_SCRIPT))
    normalised = (X - mean) / std
    outs = [net(normalised.flatten(1))]
    outs += [
        net((normalised + level * torch.special.ndtr(s) * e).flatten(1)) for s, e in zip(SHARES, NOISES, strict=True)
    ]
    assert float(found.detach()) == pytest.approx(dign_of(torch.stack(outs).detach().double().numpy()), rel=1e-4)


@pytest.mark.parametrize("name", ["gaussian", "stability", "consistency", "dign"])
def test_confident_logits_do_not_overflow(name: str) -> None:
    scale = torch.tensor(1e3, requires_grad=True)
    draw = Scripted(0.5, *[torch.randn(6, 1, 1, 1) if i % 2 == 0 and name == "dign" else E1 for i in range(6)])
    objective = objectives.make(name, X.shape[1:], 0.5, "quick")
    loss = objective(lambda x, d: scale * logits(x, d), X, Y, draw)
    loss.backward()
    assert torch.isfinite(loss)
    assert scale.grad is not None
    assert torch.isfinite(scale.grad)


def test_each_objective_is_a_row_of_its_own(bench: Callable[..., Result], tmp_path: Path) -> None:
    names = [name for name in objectives.OBJECTIVES if name not in ("smoothadv", "catrs")]  # those run in test_runs.py
    for name in names:
        ran = bench("run", "--defense", "lora", "--dataset", TINY, "--objective", name, "--out", tmp_path)
        assert ran.code == 0, ran.err
        stated = "consistency: lambda 10 and eta 0.5, as published for MNIST at this noise"
        assert (stated in ran.err) is (name == "consistency")
    assert bench("run", "--defense", "none,lora", "--dataset", TINY, "--out", tmp_path).code == 0
    (table,) = json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]
    rows = sorted(r["defense"] for r in table["rows"])
    assert rows == sorted(["none", "lora", *(f"lora + {name}" for name in names if name != "gaussian")])


def test_gaussian_is_the_default_objective(bench: Callable[..., Result], tmp_path: Path) -> None:
    args = ("run", "--defense", "lora", "--dataset", TINY, "--out", tmp_path, "--json")
    (silent,) = json.loads(bench(*args).out)
    (said,) = json.loads(bench(*args, "--objective", "gaussian").out)
    assert said["path"] == silent["path"]


@pytest.mark.parametrize(("args", "words"), [(("--objective", "consistncy"), "did you mean consistency")])
def test_unknown_objectives(bench: Callable[..., Result], args: tuple[str, ...], words: str) -> None:
    result = bench("run", "--defense", "lora", "--dataset", TINY, *args)
    assert result.code == 2
    assert words in result.err


def test_a_defense_with_a_loss_of_its_own_refuses_another(bench: Callable[..., Result]) -> None:
    result = bench("run", "--defense", defense("own_loss"), "--dataset", TINY, "--objective", "consistency")
    assert result.code == 2
    assert "a loss of its own" in result.err
