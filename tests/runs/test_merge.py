"""Merging keeps the trained function; LoRA on layers whose output is not W x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from bench import globalstate
from bench.data.datasets import load_card, load_split, load_splits
from bench.errors import BenchError, DefenseFault
from bench.interface import Defense
from bench.io.files import scratch_cache
from bench.models.base import Classifier, LocalBase, state_sha256
from bench.models.load import load_base, untrained_base
from bench.options import RunOptions
from bench.runs import doctor, fitting
from bench.runs.context import PartTraining
from bench.runs.plan import make_plans
from bench.smoothing.noise import Noise, TrainDraw
from tests.helpers.commands import TINY, Result, defense

CPU = torch.device("cpu")
DRAW = TrainDraw(Noise(0, "train"), 0, 4, 0.25, CPU)
Bench = Callable[..., Result]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# All defenses with a merge -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), [("forgets", []), ("folds", ["half=true"])])
def test_a_merge_that_changes_logits_is_refused(name: str, settings: list[str]) -> None:
    (plan,) = make_plans(RunOptions(defenses=defense(name), dataset=TINY, settings=tuple(settings)))
    train = load_split(plan.card, "train").first(100)
    with scratch_cache(), pytest.raises(DefenseFault, match=r"merge\(\) changes its logits by up to .* allowed"):
        fitting.fit(plan, untrained_base(plan.card, plan.base, CPU), train, CPU, lambda *_: None)
    assert "merge() changes its logits" in list(doctor.examine(plan))[-1].problem


def test_a_sound_merge_is_accepted(bench: Bench, tmp_path: Path) -> None:
    (plan,) = make_plans(RunOptions(defenses=defense("folds"), dataset=TINY, settings=()))
    assert [f.problem for f in doctor.examine(plan)] == [""] * 7
    result = bench("run", "--defense", defense("folds"), "--dataset", TINY, "--examples", 1, "--out", tmp_path)
    assert result.code == 0, result.err


def test_parameters_without_a_schedule_are_named() -> None:
    (plan,) = make_plans(RunOptions(defenses=defense("no_schedule"), dataset=TINY))
    last = list(doctor.examine(plan))[-1]
    assert "2 parameters to train (norm.weight, ...)" in last.problem
    assert "class Config(Schedule)" in last.problem and "requires_grad_(False)" in last.problem


# LoRA --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A small network of the layers under test, with timm's interface to its head."""

    num_classes = 10

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.fc = nn.LazyLinear(10)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x).flatten(1))
        return out


def tied() -> list[nn.Module]:
    one, two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    two.weight = one.weight
    return [nn.Conv2d(1, 4, 1), one, nn.ReLU(), two]


def pruned() -> nn.Module:
    prune.l1_unstructured(layer := nn.Conv2d(1, 4, 3, padding=1), "weight", 0.5)
    return layer


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.Conv2d(1, 4, 3, padding=1)
    layer.register_forward_hook(lambda module, inputs, output: output / module.weight.std())
    return layer


BODIES: dict[str, Callable[[], list[nn.Module]]] = {
    "parametrized Conv2d": lambda: [parametrizations.weight_norm(nn.Conv2d(1, 4, 3, padding=1))],
    "parametrized Linear": lambda: [nn.Flatten(), parametrizations.spectral_norm(nn.Linear(64, 8))],
    "Conv2d with a computed weight": lambda: [weight_norm(nn.Conv2d(1, 4, 3, padding=1))],
    "pruned": lambda: [pruned()],
    "Doubled": lambda: [Doubled(1, 4, 3, padding=1)],
    "Conv2d with hooks": lambda: [hooked()],
    "Conv2d with circular padding": lambda: [nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")],
    "layers of shared weights": tied,
    "ScaledStdConv2d": lambda: [timm.layers.ScaledStdConv2d(1, 4, 3, padding=1)],
    "StdConv2d": lambda: [timm.layers.StdConv2d(1, 4, 3, padding=1)],
    "dilated Conv2d": lambda: [nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)],
    "Conv2dSame": lambda: [nn.Conv2d(1, 4, 1), Conv2dSame(4, 4, 3, stride=2)],
    "grouped Conv2d": lambda: [nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4)],
}


def based(model: nn.Module) -> LocalBase:
    with globalstate.fixed_rng(0), torch.no_grad():
        model.eval()(torch.rand(1, 1, 8, 8))
    return LocalBase("made", Classifier(model, (0.3,), (0.4,)), lambda classes: model, 10, {}, {})


def adapted(base: LocalBase, *settings: str) -> tuple[Defense, list[str]]:
    """Build LoRA on a base with changed adapters; return it and its notes."""
    (plan,) = make_plans(RunOptions(defenses="lora", dataset=TINY, settings=settings))
    workshop = PartTraining(load_split(plan.card, "train").first(20), lambda *_: None)
    made = fitting.construct(plan, base, CPU, workshop)
    with torch.no_grad(), globalstate.fixed_rng(2):
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return made, workshop.notes


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("dora", [False, True])
def test_merging_keeps_the_trained_function_for_every_layer(kind: str, dora: bool) -> None:
    with globalstate.fixed_rng(1):
        base = based(Layers(*BODIES[kind]()))
    made, notes = adapted(base, f"dora={dora}")
    assert ("computed weight" if kind == "pruned" else kind) in " ".join(notes)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = made.logits(x, DRAW)
        made.merge()
        made.eval()
        assert (before - base.module(x)).abs().max() > 1e-3
        assert torch.allclose(made.logits(x, DRAW), before, atol=1e-5)
    base.check_unchanged("lora")


NAMED: list[tuple[str, dict[str, Any]]] = [
    ("nf_resnet26", {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}),
    ("dla46_c", {}),  # one of its layers is called base_layer, as those that peft adapts
    ("skresnet18", {}),
    ("resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "conv_layer": timm.layers.StdConv2d}),
]


@pytest.mark.parametrize(("name", "args"), NAMED)
def test_timms_families_are_adapted_and_merged(name: str, args: dict[str, Any]) -> None:
    with globalstate.fixed_rng(1):
        model = timm.create_model(name, num_classes=10, in_chans=1, **args)
    base = LocalBase(name, Classifier(model, (0.3,), (0.4,), (32, 32)), lambda classes: model, 10, {}, {})
    made, _ = adapted(base)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = made.logits(x, DRAW)
        made.merge()
        assert torch.allclose(made.eval().logits(x, DRAW), before, atol=1e-5 * float(before.abs().max()))


def test_nothing_to_adapt_names_the_layers() -> None:
    with pytest.raises(BenchError, match="it cannot adapt 1 dilated Conv2d; use full or bitfit"):
        adapted(based(Layers(nn.Conv2d(1, 4, 3, dilation=2))))


def test_a_base_broken_by_adapters_is_refused_with_the_layers_name() -> None:
    class Asks(Layers):
        def forward(self, x: Tensor) -> Tensor:
            assert type(self.body[1]) is nn.Conv2d, "no plain layer"
            return super().forward(x)

    with pytest.raises(BenchError, match=r"does not work with peft's layer at or after its input .*no plain layer"):
        adapted(based(Asks(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1))))


DEIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def distilled() -> LocalBase:
    with globalstate.fixed_rng(1):
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, in_chans=1, **DEIT)
    return LocalBase("dist", Classifier(model, (0.3,), (0.4,)), lambda classes: model, 10, {}, {})


def test_both_heads_of_a_distilled_base_are_heads() -> None:
    (plan,) = make_plans(RunOptions(defenses="head", dataset=TINY))
    trained = [n for n, p in fitting.construct(plan, distilled(), CPU).named_parameters() if p.requires_grad]
    assert {n.split("model.")[-1] for n in trained} == {
        *("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    }
    lora, _ = adapted(distilled())
    assert not [n for n, p in lora.named_parameters() if p.requires_grad and "head" in n]
    (plan,) = make_plans(RunOptions(defenses="joint", dataset=TINY))
    joint = fitting.construct(plan, distilled(), CPU)
    assert len([n for n, p in joint.named_parameters() if p.requires_grad and "head" in n]) == 4


def test_a_probe_of_two_heads_is_refused_in_one_line(tmp_path: Path) -> None:
    from bench.models.probe import new_head

    with pytest.raises(BenchError, match="has 2 heads"):
        new_head(distilled().module, 5, CPU)  # type: ignore[arg-type]


def test_loras_weights_on_the_digits_baseline_are_unchanged() -> None:
    """As of commit e61c7b0: the adapted layers, their initial values, and those after half an epoch."""
    file = str(Path(__file__).parents[2] / "reports" / "baselines" / "digits-vit.safetensors")
    (plan,) = make_plans(RunOptions(defenses="lora", dataset="digits", base=file))
    plan = replace(plan, config=replace(plan.config, epochs=0.5))
    train, validation = load_splits(load_card("digits"), "train", "validation")
    base = load_base(plan.card, file, train, validation, CPU, lambda *_: None)
    made = fitting.construct(plan, base, CPU)
    assert state_sha256(made) == "79340685bef6bae4f252221270cc17e33fa9fd55807cd8198b18bd2c5457aef4"
    with scratch_cache():
        trained = fitting.train_or_load(plan, base, train, CPU, lambda *_: None, made)
    assert len(trained.state) == 18
    # Sums of float32 differ between machines.
    total = sum(float(v.abs().double().sum()) for v in trained.state.values())
    assert total == pytest.approx(277.6106263, abs=1e-3)
