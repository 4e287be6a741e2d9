"""Measure the gain of faster arithmetic and the cost of a merged adapter: ratios of times of blocks of votes.

Run by ``make perf``. Both sides of a ratio take turns on one thread. The gain is printed and not asserted, since it
depends on the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from convnets import resnet20
from torch import Tensor, nn

from bench.interface import Draw
from bench.models import arithmetic
from bench.models.arithmetic import deterministic
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.process.environment import keep_freed_memory
from bench.runs import fitting
from bench.runs.plan import Plan, make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from bench.smoothing.task import block_rows
from tests.helpers.turns import paired

CPU = torch.device("cpu")
ROUNDS = 15


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: its processor seconds do not depend on other work on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    yield
    torch.set_num_threads(before)


class Alone(nn.Module):
    """Wrap a network as a defense that draws no randomness."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, draw: Draw) -> Tensor:
        out: Tensor = self.net(x)
        return out


def plan(defense: str) -> Plan:
    (made,) = make_plans(RunOptions(defenses=defense, dataset="digits"))
    return made


def block(shape: tuple[int, int, int]) -> tuple[Tensor, VoteDraw]:
    rows = block_rows(shape, CPU)
    votes = [Vote("estimate", 0, i) for i in range(rows)]
    noise = Noise(0, "test")
    return noise.normals(votes, shape[0] * shape[1] * shape[2]).view(rows, *shape), VoteDraw(noise, votes, 0.25, CPU)


def say(capsys: pytest.CaptureFixture[str], what: str, ratios: list[float]) -> None:
    low, high = statistics.quantiles(ratios, n=4)[::2]
    with capsys.disabled():
        print(f"\n{what}: median {statistics.median(ratios):.2f}, quartiles {low:.2f} and {high:.2f}")


@pytest.mark.parametrize("words", ["bfloat16", "channels-last", "compile"])
@pytest.mark.parametrize("network", ["ResNet-20 size", "digits ViT"])
def test_float32_over_other_arithmetic(
    benchmark: Any, capsys: pytest.CaptureFixture[str], words: str, network: str
) -> None:
    """Time a block in float32 and in another arithmetic; a ratio above 1 means that the other is faster."""
    shape = (3, 32, 32) if network.startswith("ResNet") else (1, 8, 8)
    net = resnet20() if network.startswith("ResNet") else untrained_base(plan("none").card, "vit", CPU).module
    x, draw = block(shape)
    plain, other = Alone(net), arithmetic.model(Alone(net), arithmetic.parse(words), CPU)
    with deterministic(), torch.inference_mode():
        ratios = paired(lambda: plain(x, draw), lambda: other(x, draw), ROUNDS, time.process_time)
        benchmark.pedantic(lambda: other(x, draw), rounds=3)
    say(capsys, f"{network}, float32 / {words}", ratios)
    benchmark.extra_info["ratio"] = statistics.median(ratios)


def test_a_merged_adapter_over_the_base(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A vote of merged LoRA costs at most 5% more than a vote of the base."""
    base = untrained_base(plan("none").card, "vit", CPU)
    none = fitting.construct(plan("none"), base, CPU)
    adapted, merged = (fitting.construct(plan("lora"), base, CPU) for _ in range(2))
    merged.merge()
    x, draw = block((1, 8, 8))
    with deterministic(), torch.inference_mode():
        before = paired(lambda: adapted(x, draw), lambda: none(x, draw), ROUNDS, time.process_time)
        after = paired(lambda: merged(x, draw), lambda: none(x, draw), ROUNDS, time.process_time)
        benchmark.pedantic(lambda: merged(x, draw), rounds=3)
    say(capsys, "digits ViT, LoRA / none", before)
    say(capsys, "digits ViT, merged LoRA / none", after)
    benchmark.extra_info["ratio"] = statistics.median(after)
    assert statistics.median(after) <= 1.05
