"""The parameter-efficient defenses: trained parameters, initial function, and the cost of a vote after merging."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import globalstate, plugins
from bench.data.datasets import load_card, load_split
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Defense, Draw
from bench.io.files import scratch_cache
from bench.models.base import Classifier, LocalBase
from bench.options import RunOptions
from bench.runs import doctor, fitting
from bench.runs.plan import Plan, make_plans
from bench.runs.settings import configured
from bench.smoothing.noise import Noise, TrainDraw
from bench.training import loop, objectives
from tests.helpers.commands import TINY, Result

CPU = torch.device("cpu")
Bench = Callable[..., Result]
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
DRAW = TrainDraw(Noise(0, "train"), 0, 4, 0.25, CPU)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def classifier(arch: str, **args: Any) -> LocalBase:
    """Make a base with random weights in every layer: timm's zero biases and small matrices would hide mistakes."""
    with globalstate.fixed_rng(1):
        model = timm.create_model(arch, num_classes=10, in_chans=1, **args)
        for p in model.parameters():
            if p.ndim == 1:
                nn.init.normal_(p.detach(), p.detach().mean().item(), 0.1)
            elif arch != "test_resnet":
                p.detach().mul_(4)
    size = (32, 32) if arch == "test_resnet" else None
    module = Classifier(model, (0.3,), (0.4,), size)
    return LocalBase(arch, module, lambda classes: model, 10, {}, {})


def vit(**args: Any) -> LocalBase:
    return classifier("vit_tiny_patch16_224", **VIT | args)


def resnet() -> LocalBase:
    return classifier("test_resnet")


def build(base: LocalBase, name: str, **settings: Any) -> Defense:
    (plan,) = make_plans(
        RunOptions(defenses=name, dataset=TINY, settings=tuple(f"{k}={v}" for k, v in settings.items()))
    )
    return fitting.construct(plan, base, CPU)


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def apart(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of logits, which are of order one."""
    x = images()
    with torch.no_grad():
        return float((one(x) - other(x)).abs().max())


def logits(defense: Defense) -> Callable[[Tensor], Tensor]:
    return lambda x: defense.logits(x, DRAW)


def trainable(defense: Defense) -> dict[str, nn.Parameter]:
    return {name: p for name, p in defense.named_parameters() if p.requires_grad}


# What is trained -------------------------------------------------------------------------------------


@cache
def published(arch: str) -> Classifier:
    """Make a published architecture on the meta device."""
    with torch.device("meta"):
        return Classifier(timm.create_model(arch), (0.5,) * 3, (0.5,) * 3)


def count(size: str, name: str, preset: str, **settings: Any) -> int:
    base = SimpleNamespace(copy=lambda classes: copy.deepcopy(published(f"vit_{size}_patch16_224")))
    cls, _ = plugins.load(name)
    config = configured(name, cls, preset, load_card("digits"), settings)
    defense = cls(SimpleNamespace(base=base, classes=1000, shape=(3, 224, 224)), config)
    return sum(p.numel() for p in trainable(defense).values())


@pytest.mark.parametrize(("size", "depth", "d"), [("base", 12, 768), ("large", 24, 1024)])
def test_parameters_at_the_published_sizes(size: str, depth: int, d: int) -> None:
    per_rank = {"base": 36_864, "large": 98_304}[size]
    assert count(size, "lora", "paper", rank=1) == per_rank
    assert count(size, "lora", "paper", rank=4) == 4 * per_rank
    # In the fused layer the key is adapted too, and all three share one down-projection.
    assert count(size, "lora", "quick", targets="attention", rank=1) == depth * (d + 3 * d)
    assert count(size, "adapter", "paper") == {"base": 1_189_632, "large": 3_171_840}[size]
    # AdaptFormer-64 has as many; prompt tuning's adapters have an eighth of the width: 2 d d/8 + d/8 + d a block.
    assert count(size, "adapter", "paper", parallel=0.1) == {"base": 1_189_632, "large": 3_171_840}[size]
    assert count(size, "adapter", "paper", width=d // 8) == depth * (d * d // 4 + d // 8 + d)
    assert count(size, "prompt", "paper") == {"base": 460_800, "large": 1_228_800}[size]
    assert count(size, "prompt", "paper", deep=False) == 50 * d
    assert count(size, "head", "paper") == 1000 * d + 1000
    # Biases of qkv, proj, fc1, fc2 and two norms a block; of the patch embedding, the last norm, the head.
    assert count(size, "bitfit", "paper") == depth * (3 + 1 + 4 + 1 + 2) * d + 2 * d + 1000


TRAINS = [
    ("lora", {}, "lora_"),
    ("lora", {"targets": "qv"}, "lora_"),
    ("lora", {"dora": True}, "lora_"),
    ("adapter", {}, (".down.", ".up.")),
    ("adapter", {"parallel": 0.1}, (".down.", ".up.")),
    ("prompt", {}, "prompts"),
    ("bitfit", {}, "bias"),
    ("head", {}, ".head."),
]


@pytest.mark.parametrize(("name", "settings", "part"), TRAINS)
def test_only_what_should_be_trained_is_and_only_that_is_stored(
    name: str, settings: dict[str, Any], part: str | tuple[str, ...]
) -> None:
    base = vit()
    parts = (part,) if isinstance(part, str) else part
    after, stored = fit(base, name, settings)
    before = build(base, name, **settings)
    allowed = {key for key, _ in before.named_parameters() if any(p in key for p in parts)}
    assert set(trainable(before)) == allowed
    changed = {key for key, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[key])}
    assert changed == allowed
    assert stored == allowed
    base.check_unchanged(name)


@pytest.mark.parametrize(("name", "part"), [("lora", "lora_"), ("bitfit", "bias"), ("head", "fc.")])
def test_a_convnet_keeps_the_bases_statistics(name: str, part: str) -> None:
    base = resnet()
    after, _ = fit(base, name, {})
    before = build(base, name).state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after.state_dict()[key])}
    assert changed
    assert all(part in key for key in changed)


def fit(base: LocalBase, name: str, settings: dict[str, Any]) -> tuple[Defense, set[str]]:
    """Train a defense for three steps; return it and the names of the stored tensors."""
    (plan,) = make_plans(
        RunOptions(defenses=name, dataset=TINY, settings=tuple(f"{k}={v}" for k, v in settings.items()))
    )
    train = load_split(load_card(TINY), "train").first(48)
    plan = replace(plan, config=replace(plan.config, epochs=1.0, batch=16))
    defense = fitting.construct(plan, base, CPU)
    with scratch_cache():
        trained = fitting.train_or_load(plan, base, train, CPU, lambda *_: None, defense)
    return defense, set(trained.state)


def test_an_adapters_gradient_passes_its_zero_layer_after_one_step() -> None:
    defense = build(vit(), "adapter")
    optimizer = torch.optim.SGD(trainable(defense).values(), lr=0.1)
    moved: list[set[str]] = []
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in trainable(defense).items()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(defense.logits(images(), DRAW), torch.tensor([1, 2, 3, 4])).backward()
        optimizer.step()
        moved.append({name for name, p in trainable(defense).items() if not torch.equal(p, before[name])})
    assert moved[0] == {name for name in trainable(defense) if ".up." in name}
    assert moved[1] == set(trainable(defense))


@pytest.mark.parametrize("parallel", [0.0, 0.1])
def test_an_adapter_computes_the_papers_function(parallel: float) -> None:
    """The block again from its layers: x + h + up(gelu(down(h))) of h = MLP(LN(x)), as in prompt tuning's code.

    Or AdaptFormer's x + MLP(LN(x)) + .1 up(relu(down(LN(x)))).
    """
    base = vit(depth=1)
    defense = build(base, "adapter", parallel=parallel, width=3)
    with torch.no_grad(), globalstate.fixed_rng(2):
        for p in trainable(defense).values():
            p.add_(torch.randn_like(p))
    given = {name.rpartition("mlp.")[2]: p for name, p in trainable(defense).items()}
    plain: Any = base.module.model
    (block,) = plain.blocks

    def bottleneck(x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        return act(x @ given["down.weight"].T + given["down.bias"]) @ given["up.weight"].T + given["up.bias"]

    def oracle(image: Tensor) -> Tensor:
        patches = plain.patch_embed((image - 0.3) / 0.4)
        x = torch.cat([plain.cls_token.expand(len(image), -1, -1), patches], 1) + plain.pos_embed
        x = x + block.attn(block.norm1(x))
        normed = block.norm2(x)
        h = block.mlp.fc2(block.mlp.act(block.mlp.fc1(normed)))
        added = 0.1 * bottleneck(normed, torch.relu) if parallel else bottleneck(h, nn.functional.gelu)
        out: Tensor = plain.head(plain.norm(x + h + added)[:, 0])
        return out

    assert apart(logits(defense), base.module) > 1e-2
    assert apart(logits(defense), oracle) < 1e-5
    assert (apart(logits(defense.train()), oracle) > 1e-3) is (parallel > 0)  # AdaptFormer's dropout, in training alone


def test_a_parallel_adapter_starts_as_adaptformers() -> None:
    built = trainable(build(vit(depth=1), "adapter", parallel=0.1))
    fresh = {name.rpartition("mlp.")[2]: p.detach() for name, p in built.items()}
    assert not any(fresh[name].any() for name in ("down.bias", "up.weight", "up.bias"))
    # Kaiming's uniform with a = sqrt(5), as released: a bound of 1 / sqrt(inputs).
    assert 0.8 < float(fresh["down.weight"].abs().max()) * 32**0.5 <= 1


# The papers' searches ----------------------------------------------------------------------------------

ADAMW, SGD = (1e-4, 5e-4, 1e-3, 5e-3), (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50)
DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
# Rates before the factor batch / 256, batch, weight decays, and the schedule: prompt tuning's released code.
SEARCHES: dict[str, tuple[tuple[float, ...], int, tuple[float, ...], tuple[str, float]]] = {
    "full": (ADAMW, 384, DECAYS, ("adamw", 0.05)),
    "adapter": (ADAMW, 384, DECAYS, ("adamw", 0.05)),
    "bitfit": (ADAMW, 384, (0.0,), ("adamw", 0.05)),
    "prompt": (SGD, 128, DECAYS, ("sgd", 0.1)),
    "head": (SGD, 1024, DECAYS, ("sgd", 0.1)),
}


def documented(name: str) -> list[str]:
    """Return the commands in a defense's docstring."""
    text = inspect.getdoc(plugins.load(name)[0]) or ""
    return [c.replace("\\\n", " ") for c in re.findall(r"^    (bench run (?:.*\\\n)*.*)$", text, re.MULTILINE)]


def plans_of(bench: Bench, monkeypatch: pytest.MonkeyPatch, command: str) -> list[Plan]:
    """Return the plans that a command makes on its way to an estimate."""
    made: list[Plan] = []
    monkeypatch.setattr("bench.cli.estimates.print_estimates", lambda plans, *_: made.extend(plans))
    result = bench(*shlex.split(command)[1:], "--dry-run")
    assert result.code == 0, result.err
    return made


@pytest.mark.parametrize("name", SEARCHES)
def test_the_documented_search_is_the_papers(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rates, batch, decays, (optimizer, warmup) = SEARCHES[name]
    (plan,) = plans_of(bench, monkeypatch, documented(name)[0])
    found = {(c.lr, c.weight_decay) for _, c in plan.candidates}
    assert len(found) == len(plan.candidates)
    np.testing.assert_allclose(sorted(found), sorted((r * batch / 256, d) for r in rates for d in decays))
    (default,) = make_plans(RunOptions(defenses=name, dataset="cifar10", preset="paper"))
    for config in (default.config, *(c for _, c in plan.candidates)):
        assert (config.batch, config.optimizer, config.warmup, config.epochs) == (batch, optimizer, warmup, 100)
        assert (config.decay, config.momentum) == ("cosine", 0.9)
    assert any(default.config.lr == pytest.approx(r * batch / 256) for r in rates)


def test_the_documented_adaptformer_is_the_released_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, command = documented("adapter")
    (plan,) = plans_of(bench, monkeypatch, command)
    c = plan.config
    assert (c.width, c.parallel, c.optimizer, c.epochs, c.warmup) == (64, 0.1, "sgd", 100, 0.2)
    assert (c.lr, c.batch, c.weight_decay) == (pytest.approx(0.1 * 1024 / 256), 1024, 0)


# Where they start ------------------------------------------------------------------------------------

EXACT = [
    ("lora", {}),
    ("lora", {"targets": "attention"}),
    ("adapter", {}),
    ("adapter", {"parallel": 0.1}),
    ("bitfit", {}),
    ("head", {}),
    ("full", {}),
]
ROUNDED = [("lora", {"targets": "qv"}), ("lora", {"dora": True}), ("lora", {"targets": "qv", "dora": True})]


@pytest.mark.parametrize(("name", "settings"), EXACT)
def test_untrained_it_is_the_base_to_the_last_bit(name: str, settings: dict[str, Any]) -> None:
    base = vit()
    assert apart(logits(build(base, name, **settings)), base.module) == 0


@pytest.mark.parametrize(("name", "settings"), ROUNDED)
def test_untrained_it_is_the_base_up_to_rounding(name: str, settings: dict[str, Any]) -> None:
    base = vit()
    assert apart(logits(build(base, name, **settings)), base.module) <= 2e-6


@pytest.mark.parametrize("name", ["lora", "bitfit", "head"])
def test_untrained_it_is_a_convnet_base(name: str) -> None:
    base = resnet()
    assert apart(logits(build(base, name)), base.module) == 0


KINDS: list[dict[str, Any]] = [
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "avgmax", "fc_norm": False, "pre_norm": True},
    {"global_pool": "map", "class_token": False},
    {"reg_tokens": 3, "no_embed_class": True},
    {"dynamic_img_size": True, "pos_embed": "none", "init_values": 0.1},
]


@pytest.mark.parametrize("args", KINDS)
@pytest.mark.parametrize("deep", [False, True])
def test_no_prompts_is_the_base(args: dict[str, Any], deep: bool) -> None:
    base = vit(**args)
    # Without a class token the memory layout of patches differs, so sums are rounded in another order.
    assert apart(logits(build(base, "prompt", tokens=0, deep=deep)), base.module) <= (
        0 if args.get("class_token", True) else 1e-6
    )
    assert apart(logits(build(base, "prompt", tokens=2, deep=deep)), base.module) > 1e-3


@pytest.mark.parametrize("pool", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}])
@pytest.mark.parametrize("deep", [False, True])
def test_prompts_do_what_timms_register_tokens_do(pool: dict[str, Any], deep: bool) -> None:
    """An independent oracle: register tokens follow the class token, without position, outside of the average."""
    base = vit(no_embed_class=True, **pool)
    defense = build(base, "prompt", tokens=3, deep=deep)
    prompts = next(iter(trainable(defense).values())).detach()
    other = vit(no_embed_class=True, reg_tokens=3, **pool)
    oracle: Any = other.module.model
    of_base: Any = base.module.model
    oracle.load_state_dict({**of_base.state_dict(), "reg_token": prompts[:1]})
    for block, own in zip(oracle.blocks, prompts, strict=False):

        def replace_registers(_: nn.Module, inputs: tuple[Tensor], own: Tensor = own) -> Tensor:
            x, first = inputs[0].clone(), int(of_base.has_class_token)
            x[:, first : first + 3] = own
            return x

        block.register_forward_pre_hook(replace_registers)
    assert apart(logits(defense), other.module) < 1e-5
    # dim 32, patches of 1 x 2 x 2.
    assert prompts.shape == (2 if deep else 1, 3, 32)
    assert 0.8 < float(prompts.abs().max()) / (6 / (4 + 32)) ** 0.5 <= 1


# Merged ----------------------------------------------------------------------------------------------


def flops(model: Callable[[Tensor], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images())
    return int(counter.get_total_flops())


@pytest.mark.parametrize("targets", ["linear", "attention", "qv", "convnet"])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_it_is_the_same_function_at_the_cost_of_the_base(targets: str, dora: bool) -> None:
    base, targets = (resnet(), "linear") if targets == "convnet" else (vit(), targets)
    defense = build(base, "lora", targets=targets, dora=dora)
    with torch.no_grad(), globalstate.fixed_rng(2):
        for p in trainable(defense).values():
            p.add_(0.1 * torch.randn_like(p))
    x = images()
    with torch.no_grad():
        before = defense.logits(x, DRAW)
    assert (before - base.module(x)).abs().max() > 1e-2
    assert flops(logits(defense)) > flops(base.module)
    defense.merge()
    with torch.no_grad():
        assert (defense.logits(x, DRAW) - before).abs().max() < 1e-5
    assert flops(logits(defense)) == flops(base.module)
    assert {k.rpartition("model.")[2]: v.shape for k, v in defense.state_dict().items()} == {
        k.rpartition("model.")[2]: v.shape for k, v in base.module.state_dict().items()
    }


def test_qv_leaves_the_key_as_it_is() -> None:
    base = vit()
    defense = build(base, "lora", targets="qv")
    with torch.no_grad(), globalstate.fixed_rng(2):
        for p in trainable(defense).values():
            p.add_(0.1 * torch.randn_like(p))
    defense.merge()
    before, after = base.module.state_dict(), dict(defense.state_dict())
    fused = [key for key in before if ".qkv." in key]
    assert len(fused) == 4
    for key in fused:
        (now,) = (value for name, value in after.items() if name.endswith(key))
        same = [torch.equal(a, b) for a, b in zip(now.chunk(3), before[key].chunk(3), strict=True)]
        assert same == ([False, True, False] if key.endswith("weight") else [True] * 3), key


# Bases they do not fit -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def convnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny card with a ResNet as its base."""
    text = Path(TINY).read_text().partition("[bases.vit]")[0]
    path = tmp_path_factory.mktemp("card") / "convnet.toml"
    path.write_text(
        text + '[bases.resnet]\nmodel = "test_resnet"\nargs = { in_chans = 1 }\nschedule = { epochs = 1 }\n'
    )
    return str(path)


@pytest.mark.parametrize(
    ("defense", "setting", "words"),
    [
        ("prompt", "tokens=4", "(ResNet) is not timm's VisionTransformer"),
        ("adapter", "width=4", "(ResNet) has no transformer blocks"),
        ("lora", "targets=qv", "targets=qv matches no layer of this base (ResNet); try --set targets=linear"),
        ("lora", "targets=attention", "targets=attention matches no layer"),
        ("lora", "rank=0", "rank=0 must be at least 1"),
        ("adapter", "width=0", "width=0 must be at least 1"),
        ("adapter", "parallel=-1", "parallel=-1 must be 0"),
        ("adapter", "parallel=nan", "parallel: nan is not a finite number"),
        ("prompt", "tokens=-1", "tokens must be at least 0"),
        ("prompt", "dropout=1", "below 1"),
    ],
)
def test_refused_in_one_line(
    bench: Bench, convnet: str, tmp_path: Path, defense: str, setting: str, words: str
) -> None:
    result = bench("run", "--defense", defense, "--dataset", convnet, "--set", setting, "--dry-run", "--out", tmp_path)
    assert result.code == 2
    assert result.err.strip().splitlines()[-1].startswith("bench: ")
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow  # a base of timm's own size, and many passes
@pytest.mark.parametrize(("name", "setting"), [("lora", "dora=true"), ("bitfit", "lr=0.01"), ("head", "lr=0.01")])
def test_a_convnet_is_defended(convnet: str, name: str, setting: str) -> None:
    (plan,) = make_plans(RunOptions(defenses=name, dataset=convnet, settings=(setting,)))
    found = list(doctor.examine(plan))
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


# Resumed ---------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize(("name", "settings"), [("prompt", {}), ("lora", {"targets": "qv", "dora": True})])
def test_killed_and_resumed_it_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    base, data = vit(), load_split(load_card(TINY), "train").first(64)
    undisturbed = resumed_fit(build(base, name, batch=16, epochs=2, **settings), data, tmp_path / "a.pt")
    with pytest.raises(Killed):
        resumed_fit(build(base, name, batch=16, epochs=2, **settings), data, tmp_path / "b.pt", die_at=5)
    assert (tmp_path / "b.pt").exists()
    resumed = resumed_fit(build(base, name, batch=16, epochs=2, **settings), data, tmp_path / "b.pt")
    assert undisturbed.keys() == resumed.keys()
    for key, value in undisturbed.items():
        assert torch.equal(value, resumed[key]), key


def resumed_fit(defense: Defense, data: Split, checkpoint: Path, die_at: int = 10**9) -> dict[str, Tensor]:
    calls = 0

    def objective(f: Any, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Killed
        return objectives.gaussian(f, x, y, draw)

    job = loop.TrainingJob(data, (), 0.25, objective, 0, CPU, checkpoint, lambda *_: None, [])
    with globalstate.fixed_rng(0):
        defense.fit(job)
    return {key: value.clone() for key, value in defense.state_dict().items()}


# none ------------------------------------------------------------------------------------------------


def test_none_clips_where_asked(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "none", "--dataset", TINY, "--sigma", ".5", "--out", tmp_path)
    assert bench(*args).code == 0
    assert bench(*args, "--set", "clip=true").code == 0
    runs = {}
    for path in tmp_path.iterdir():
        identity = json.loads((path / "run.json").read_text())["identity"]
        lines = (path / "certificates.jsonl").read_text().splitlines()
        runs[identity["defense"]["config"]["clip"]] = [json.loads(line)["top_count"] for line in lines]
    assert runs.keys() == {False, True}
    assert runs[False] != runs[True]
    report = bench("report", tmp_path)
    assert report.code == 0
    rows = [line for line in report.out.splitlines() if line.startswith("| none")]
    assert len(rows) == 2


def test_clipping_applies_to_the_bases_input() -> None:
    base = vit()
    x = images()
    with torch.no_grad():
        assert torch.equal(build(base, "none", clip=True).logits(x, DRAW), base.module(x.clamp(0, 1)))
        assert torch.equal(build(base, "none").logits(x, DRAW), base.module(x))


def test_layers_that_no_image_passes_through_get_no_adapter() -> None:
    """BEiT's projection is used without a call; an adapter there would count as trained and have no effect."""
    beit = classifier("beit_base_patch16_224", **VIT)
    with pytest.raises(BenchError, match="targets=attention matches no layer of this base"):
        build(beit, "lora", targets="attention")
    adapted = trainable(build(beit, "lora", targets="linear"))
    assert any(".mlp.fc1." in name for name in adapted)
    assert not any(".qkv." in name for name in adapted)
