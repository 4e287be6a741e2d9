"""Weights rounded to bfloat16 once give autocast's logits to the last bit, and stay as they are for other runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from bench import globalstate
from bench.data.datasets import load_splits
from bench.data.split import Split
from bench.models import arithmetic
from bench.models.architectures import CifarResNet
from bench.models.base import LocalBase
from bench.models.load import untrained_base
from bench.models.rounded import RoundedWeights
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.certifier import Certifier
from bench.runs.context import PartTraining
from bench.runs.plan import Plan, make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from tests.helpers.commands import TINY, Result

CPU = torch.device("cpu")
ROWS = 16


class Roundings(TorchDispatchMode):
    """Count how often one of some tensors is converted to bfloat16."""

    def __init__(self, of: Iterable[Tensor]) -> None:
        super().__init__()
        self._of, self.count = {t.data_ptr() for t in of}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        converts = func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy)
        self.count += converts and args[0].data_ptr() in self._of
        return func(*args, **(kwargs or {}))


def draw() -> VoteDraw:
    return VoteDraw(Noise(0, "test"), [Vote("estimate", 0, i) for i in range(ROWS)], 0.25, CPU)


def noisy(shape: tuple[int, int, int]) -> Tensor:
    return (
        Noise(1, "test")
        .normals([Vote("estimate", 0, i) for i in range(ROWS)], shape[0] * shape[1] * shape[2])
        .view(ROWS, *shape)
    )


def by_autocast(defense: nn.Module, x: Tensor, weights: Iterable[Tensor] = ()) -> tuple[Tensor, int]:
    """Return the logits that autocast alone gives, and how many weights it rounded."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), Roundings(weights) as seen:
        return defense(x, draw()).float(), seen.count


def assert_rounded_once(defense: nn.Module, shape: tuple[int, int, int], base: nn.Module | None = None) -> None:
    """The logits are autocast's; after the first block no weight of a linear or convolution layer is rounded."""
    modules = [m for top in (defense, base) if top is not None for m in top.modules()]
    layers = dict.fromkeys(m for m in modules if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d))
    weights = [t for m in layers for t in (m.weight, m.bias) if t is not None]
    values = [t.clone() for t in weights]
    x = noisy(shape)
    expected, every_block = by_autocast(defense, x, weights)
    model = arithmetic.model(defense, ("bfloat16",), CPU, base)
    with torch.inference_mode():
        first = model(x, draw())
        with Roundings(weights) as seen:
            again = model(x, draw())
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert every_block > 0 and seen.count == 0
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(weights, values, strict=True))
    assert not any("forward" in vars(m) for m in modules)
    assert torch.equal(by_autocast(defense, x)[0], expected)  # as before, for other runs


class Alone(nn.Module):
    """Wrap a network as a defense that draws no randomness."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval()

    def forward(self, x: Tensor, draw: Any) -> Tensor:
        out: Tensor = self.net(x)
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2
    ),
    "ResNet-110": lambda: CifarResNet(),
    "ConvNeXt": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1)),
    "convolutions of every kind": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=4, bias=False),
        nn.Conv2d(8, 8, 3, stride=2, dilation=2),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.LazyLinear(10),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_bits_of_autocast(name: str) -> None:
    with globalstate.fixed_rng(0):
        net = NETWORKS[name]().eval()
        net(torch.zeros(1, 3, 32, 32))
    assert_rounded_once(Alone(net), (3, 32, 32))


@cache
def splits() -> tuple[Split, Split]:
    train, test = load_splits(plan("none").card, "train", "test")
    return train.first(64), test


def plan(name: str, *settings: str) -> Plan:
    (found,) = make_plans(RunOptions(defenses=name, dataset=TINY, settings=settings))
    return found


def built(of: Plan, merged: bool) -> tuple[Any, LocalBase]:
    """Return a defense whose own weights have moved from their start, and its base."""
    with globalstate.fixed_rng(0):
        base = untrained_base(of.card, of.base, CPU, probe=not of.cls.adapts)
        defense = fitting.construct(of, base, CPU, PartTraining(splits()[0], lambda *_: None, 2))
        with torch.no_grad():
            for p in (p for p in defense.parameters() if p.requires_grad):
                p.add_(0.05 * torch.randn(p.shape))
    if merged:
        fitting.merge(defense, splits()[0], of, CPU)
    assert isinstance(base, LocalBase)
    return defense.eval(), base


DEFENSES = {
    "none": plan("none"),
    "lora": plan("lora"),
    "adapter": plan("adapter"),
    "prompt": plan("prompt"),
    "denoiser": plan("denoiser"),
    "denoiser that queries": plan("denoiser", "access=query"),
    "diffusion": plan("diffusion", "width=8"),
    "two-stage": plan("two-stage"),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_has_the_bits_of_autocast(name: str, merged: bool) -> None:
    defense, base = built(DEFENSES[name], merged)
    assert_rounded_once(defense, (1, 8, 8), base.module)
    base.check_unchanged(name)


class Elsewhere(nn.Module):
    """Reads its layer's weight itself, where autocast computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        norms: Tensor = self.layer.weight.norm(dim=1)
        out: Tensor = self.layer(x.flatten(1))
        return out / norms + functional.linear(x.flatten(1), functional.softmax(self.layer.weight, 1))


class InFloat32(nn.Module):
    """Turns autocast off for one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(192, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.flatten(1))
        with torch.autocast("cpu", enabled=False):
            out: Tensor = self.other(x.float())
        return out


READ_OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "elsewhere": Elsewhere,
    "in float32": InFloat32,
    "weight norm": lambda: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(192, 10))),
    "old weight norm": lambda: nn.Sequential(nn.Flatten(), torch.nn.utils.weight_norm(nn.Linear(192, 10))),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten()),
    "standardised": lambda: nn.Sequential(StdConv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10)),
    "attention": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=8, patch_size=4, depth=1),
    "multi-head attention": lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2)),
    "tied": lambda: tied(),
}


def tied() -> nn.Module:
    """Share tensors between layers that autocast computes in bfloat16 and one that it computes in float32."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.LayerNorm(192), nn.Linear(192, 192))
    net[3].weight = net[1].weight
    net[2].weight = net[3].bias
    return net


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_weights_read_otherwise_have_the_bits_of_autocast(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with globalstate.fixed_rng(0):
        defense, x = Alone(READ_OTHERWISE[name]()), noisy((3, 8, 8))
        defense(x, draw())  # makes lazy layers
    expected, _ = by_autocast(defense, x)
    model = arithmetic.model(defense, ("bfloat16",), CPU)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert torch.equal(model(x, draw()), expected) and torch.equal(model(x, draw()), expected)
    assert not caplog.records


class Writes(nn.Module):
    """Sets the weight of its layer for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 10)

    def forward(self, x: Tensor, draw: Any) -> Tensor:
        self.layer.weight.data = 1 + draw.normal(1)[:10].expand(10, 192)
        out: Tensor = self.layer(x.flatten(1))
        return out


def test_a_weight_that_changes_is_rounded_in_every_block(caplog: pytest.LogCaptureFixture) -> None:
    with globalstate.fixed_rng(0):
        defense = Writes()
    x = noisy((3, 8, 8))
    expected, _ = by_autocast(defense, x)
    defense.layer.weight.data = torch.zeros(10, 192)
    model = arithmetic.model(defense, ("bfloat16",), CPU)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        assert torch.equal(model(x, draw()), expected) and torch.equal(model(x, draw()), expected)
    assert "rounded in every block" in caplog.text


def test_copies_for_threads_share_the_rounded_weights() -> None:
    defense, base = built(plan("denoiser"), merged=True)
    one = Certifier("denoiser", defense, base, ("bfloat16",))
    x = noisy((1, 8, 8))

    class Used(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.weights: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.linear, torch.ops.aten.conv2d):
                assert args[1].dtype == torch.bfloat16
                self.weights.add(args[1].data_ptr())
            return func(*args, **(kwargs or {}))

    def used(certifier: Certifier) -> set[int]:
        model = certifier.model(CPU)
        with torch.inference_mode():
            model(x, draw())
            with Used() as seen:
                model(x, draw())
        return seen.weights

    kept = [one, one.copy(share_weights=True), one.copy(share_weights=False)]
    first, thread, device = map(used, kept)
    assert first and first == thread and not first & device


def test_a_certifier_that_has_voted_can_be_sent_and_certifies_the_same() -> None:
    pytest.importorskip("ray")
    from bench.cluster.worker import pack, unpack

    defense, base = built(plan("denoiser"), merged=True)
    here, x = Certifier("denoiser", defense, base, ("bfloat16",)), noisy((1, 8, 8))
    with torch.inference_mode():
        expected = here.model(CPU)(x, draw())
        packed = pack(here)
        assert len(packed) < 1.1 * len(pack(Certifier("denoiser", defense, base)))
        assert torch.equal(unpack(packed).model(CPU)(x, draw()), expected)


def test_weights_that_change_later_are_rounded_again() -> None:
    weights, weight = RoundedWeights(), nn.Parameter(torch.ones(3))
    assert weights.of(weight) is weights.of(weight)
    before = weights.of(weight)
    with torch.no_grad():
        weight.mul_(3)
    assert torch.equal(weights.of(weight), torch.full((3,), 3.0).bfloat16()) and before[0] == 1


def test_a_defense_may_differentiate_by_the_pixels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).requires_grad_(False)

    class Gradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, draw: Any) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                x = x.clone().requires_grad_(True)
                (slope,) = torch.autograd.grad(self.net(x).logsumexp(1).sum(), x)
                return slope.flatten(1)[:, :10]

    assert_rounded_once(Gradient(), (3, 8, 8))


def test_the_same_votes_in_a_run(
    bench: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    """Two threads count the votes that autocast alone gives, with a queried base and with a copied one."""

    def counts(name: str) -> list[str]:
        command = ("run", "--defense", "none,lora", "--dataset", TINY, "--arithmetic", "bfloat16")
        ran = bench(*command, "--out", tmp_path / name)
        assert ran.code == 0, ran.err
        lines = [f.read_text().splitlines() for f in sorted((tmp_path / name).glob("*/certificates.jsonl"))]
        return [line.split(', "seconds"')[0] for found in lines for line in sorted(found)]

    set_threads(2)
    ours = counts("ours")
    assert len(ours) == 16
    monkeypatch.setattr("bench.models.rounded._plain", lambda layer: False)
    set_threads(1)
    assert counts("autocast") == ours


@pytest.mark.slow
def test_compiled_they_have_the_bits_of_compiled_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, base = built(plan("denoiser"), merged=True)
    x = noisy((1, 8, 8))

    def compiled() -> Tensor:
        model = arithmetic.model(defense, ("bfloat16", "compile"), CPU, base.module)
        with torch.inference_mode():
            first, again = (model(x + 0, draw()) for _ in range(2))
        assert torch.equal(first, again)
        return first

    ours = compiled()
    monkeypatch.setattr("bench.models.rounded._plain", lambda layer: False)
    assert torch.equal(compiled(), ours)
