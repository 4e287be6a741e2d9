"""Objectives: their formulas compared with plain computations, and a table row for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.interface import Draw
from bench.training import objectives
from tests.helpers.commands import TINY, Result, defense


class Scripted:
    """A draw whose noise is given."""

    def __init__(self, sigma: float, *noise: Tensor) -> None:
        self.sigma, self.noise = sigma, list(noise)

    def normal(self, *shape: int) -> Tensor:
        return self.noise.pop(0)


torch.manual_seed(0)
X, Y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
E1, E2 = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
W = torch.randn(4, 3)


def logits(x: Tensor, draw: Draw) -> Tensor:
    return x.flatten(1) @ W


def p(x: Tensor) -> Tensor:
    return (x.flatten(1) @ W).softmax(1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(1).mean()


def test_gaussian() -> None:
    found = objectives.gaussian(logits, X, Y, Scripted(0.5, E1))
    torch.testing.assert_close(found, -p(X + 0.5 * E1)[range(6), Y].log().mean())


def test_stability() -> None:
    found = objectives.stability(logits, X, Y, Scripted(0.5, E1))
    torch.testing.assert_close(found, -p(X)[range(6), Y].log().mean() + 2 * kl(p(X), p(X + 0.5 * E1)))


@pytest.mark.parametrize(("sigma", "weight"), [(0.12, 20.0), (0.25, 20.0), (0.5, 10.0), (1.0, 10.0)])
def test_consistency(sigma: float, weight: float) -> None:
    found = objectives.consistency(logits, X, Y, Scripted(sigma, E1, E2))
    a, b = p(X + sigma * E1), p(X + sigma * E2)
    mean = (a + b) / 2
    right = -(a[range(6), Y].log().mean() + b[range(6), Y].log().mean()) / 2
    entropy = -(mean * mean.log()).sum(1).mean()
    torch.testing.assert_close(found, right + weight * (kl(mean, a) + kl(mean, b)) / 2 + 0.5 * entropy)


def test_dign() -> None:
    scales = [torch.randn(6, 1, 1, 1) for _ in range(3)]
    noise = [torch.randn(6, 1, 2, 2) for _ in range(3)]
    script = [t for pair in zip(scales, noise, strict=True) for t in pair]
    found = objectives.dign(logits, X, Y, Scripted(0.5, *script))
    parts = [kl(p(X), p(X + 0.5 * torch.special.ndtr(s) * e)) for s, e in zip(scales, noise, strict=True)]
    torch.testing.assert_close(found, -p(X)[range(6), Y].log().mean() + 0.2 * sum(parts) / 3)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_confident_logits_do_not_overflow(name: str) -> None:
    scale = torch.tensor(1e3, requires_grad=True)
    draw = Scripted(0.5, *[torch.randn(6, 1, 1, 1) if i % 2 == 0 and name == "dign" else E1 for i in range(6)])
    loss = objectives.OBJECTIVES[name](lambda x, d: scale * logits(x, d), X, Y, draw)
    loss.backward()
    assert torch.isfinite(loss)
    assert scale.grad is not None
    assert torch.isfinite(scale.grad)


def test_each_objective_is_a_row_of_its_own(bench: Callable[..., Result], tmp_path: Path) -> None:
    for name in objectives.OBJECTIVES:
        ran = bench("run", "--defense", "lora", "--dataset", TINY, "--objective", name, "--out", tmp_path)
        assert ran.code == 0, ran.err
    assert bench("run", "--defense", "none,lora", "--dataset", TINY, "--out", tmp_path).code == 0
    (table,) = json.loads(bench("report", tmp_path, "--format", "json").out)["tables"]
    rows = sorted(r["defense"] for r in table["rows"])
    assert rows == ["lora", "lora + consistency", "lora + dign", "lora + stability", "none"]


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
