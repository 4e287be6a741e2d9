"""Measure the gain of faster arithmetic and the cost of a merged adapter: ratios of times of blocks of votes.

Run by ``make perf``. Both sides of a ratio take turns on one thread. The gains are printed, last as the table of
docs/scale.md, and not asserted, since they depend on the machine.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import cifar_vit, resnet20
from tabulate import tabulate
from torch import Tensor, nn

from bench.interface import Draw
from bench.models import arithmetic
from bench.models.architectures import CifarResNet, vit_earlyconv
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits ViT": lambda: untrained_base(plan("none").card, "vit", CPU).module,
    "CIFAR ViT": cifar_vit,
    "early-convolution ViT": lambda: vit_earlyconv().eval(),
    "ResNet-20 size": resnet20,
    "ResNet-110": lambda: CifarResNet().eval(),
}
WORDS = ("bfloat16", "channels-last", "compile")


def subject(network: str) -> tuple[nn.Module, Tensor, VoteDraw]:
    """Return a network with random weights and a block of noise."""
    return NETWORKS[network](), *block((1, 8, 8) if network == "digits ViT" else (3, 32, 32))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, float]]]:
    """Collect ratios by network and word; print them as Markdown after the last test."""
    found: dict[str, dict[str, float]] = {}
    yield found
    rows = [[name, *(f"{found[name][w]:.2f}" if w in found[name] else "-" for w in WORDS)] for name in found]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nFloat32 over other arithmetic, seconds of a block in one thread:\n")
        print(tabulate(rows, headers=["network", *WORDS], tablefmt="github", disable_numparse=True))


# Compilation takes longer than its measurement, so two networks show its gain.
CASES = [(n, w) for n in NETWORKS for w in WORDS if w != "compile" or n in ("digits ViT", "ResNet-20 size")]


@pytest.mark.parametrize(("network", "words"), CASES)
def test_float32_over_other_arithmetic(
    benchmark: Any, capsys: pytest.CaptureFixture[str], table: dict[str, dict[str, float]], network: str, words: str
) -> None:
    """Time a block in float32 and in another arithmetic; a ratio above 1 means that the other is faster."""
    net, x, draw = subject(network)
    plain, other = Alone(net), arithmetic.model(Alone(copy.deepcopy(net)), arithmetic.parse(words), CPU)
    with deterministic(), torch.inference_mode():
        ratios = paired(lambda: plain(x, draw), lambda: other(x, draw), ROUNDS, time.process_time)
        benchmark.pedantic(lambda: other(x, draw), rounds=3)
    say(capsys, f"{network}, float32 / {words}", ratios)
    benchmark.extra_info["ratio"] = table.setdefault(network, {})[words] = statistics.median(ratios)


@pytest.mark.parametrize("network", ["digits ViT", "CIFAR ViT", "ResNet-110"])
def test_weights_rounded_in_every_block_over_once(
    benchmark: Any, capsys: pytest.CaptureFixture[str], network: str
) -> None:
    """Time a block by autocast alone and with weights that were rounded to bfloat16 once."""
    net, x, draw = subject(network)
    once = arithmetic.model(Alone(net), ("bfloat16",), CPU)

    def every() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = net(x)
        return out.float()

    with deterministic(), torch.inference_mode():
        assert torch.equal(every(), once(x, draw))
        ratios = paired(every, lambda: once(x, draw), ROUNDS, time.process_time)
        benchmark.pedantic(lambda: once(x, draw), rounds=3)
    say(capsys, f"{network} in bfloat16, weights rounded in every block / once", ratios)
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
