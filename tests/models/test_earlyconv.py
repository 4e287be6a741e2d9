"""The vision transformer with early convolutions: its architecture, its files, and defenses of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import globalstate
from bench.data.card import Card, Recipe
from bench.data.datasets import load_card, load_splits
from bench.interface import Defense
from bench.models.architectures import timm
from bench.models.base import LocalBase, state_sha256
from bench.models.load import load_base
from bench.models.recipes import recipe_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.plan import make_plans
from tests.helpers.commands import TINY
from tests.helpers.norms import moved
from tests.helpers.timmfolders import load

CPU = torch.device("cpu")
SMALL = {"img_size": 8, "in_chans": 1, "stem_width": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(**args: Any) -> VisionTransformer:
    """Make one in eval mode whose batch norms are not the identity."""
    with globalstate.fixed_rng(1):
        model: VisionTransformer = timm.create_model("vit_earlyconv", **args).eval()  # type: ignore[assignment]
    return moved(model)


def tokens(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Xiao et al.'s stem for 32x32, from the tensors alone: four 3x3 convolutions, then a 1x1."""
    for i, stride in enumerate((1, 2, 1, 2)):
        name = f"patch_embed.backbone.{i}"
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=1)
        mean, var, weight, bias = (state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, mean, var, weight, bias).relu()
    x = F.conv2d(x, state["patch_embed.backbone.4.conv.weight"], state["patch_embed.backbone.4.conv.bias"])
    return x.flatten(2).transpose(1, 2)


def test_its_tokens_are_those_of_four_strided_convolutions() -> None:
    model = made()
    state = model.state_dict()
    shapes = [tuple(state[f"patch_embed.backbone.{i}.conv.weight"].shape) for i in range(5)]
    assert shapes == [(48, 3, 3, 3), (48, 48, 3, 3), (96, 48, 3, 3), (96, 96, 3, 3), (128, 96, 1, 1)]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = tokens(state, x), model.patch_embed(x)
    assert found.shape == (2, 64, 128)  # a token for each 4x4 pixels
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float(found.std()) > 0.1


@pytest.mark.parametrize(("stem", "width", "depth"), [(48, 128, 4), (64, 128, 4), (48, 192, 2)])
def test_its_parameters_and_operations_are_those_of_its_layers(stem: int, width: int, depth: int) -> None:
    model = made(stem_width=stem, embed_dim=width, depth=depth, class_token=False, global_pool="avg")
    s, d = stem, width
    products = [3 * 9 * s, s * 9 * s, s * 9 * 2 * s, 2 * s * 9 * 2 * s, 2 * s * d]  # weights of the convolutions
    norms, block = 2 * (s + s + 2 * s + 2 * s), 12 * d * d + 13 * d  # a block: four matrices, biases, two norms
    parameters = sum(products) + norms + d + 64 * d + depth * block + 2 * d + 10 * d + 10
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    convolutions = sum(n * pixels for n, pixels in zip(products, (1024, 256, 256, 64, 64), strict=True))
    linear = depth * 64 * 12 * d * d + 10 * d
    counted = counter.get_total_flops()
    # Where torch counts attention, 2 * 64^2 * d more in each block.
    assert counted - 2 * (convolutions + linear) in (0, 2 * depth * 2 * 64**2 * d)
    assert 2 * (convolutions + linear + depth * 2 * 64**2 * d) <= 0.2e9  # as the presets quick and cpu promise


def test_it_is_timms_vision_transformer() -> None:
    assert "vit_earlyconv" in timm.list_models() and "vit_earlyconv" not in timm.list_models(pretrained=True)
    model = made(**SMALL)
    assert isinstance(model, VisionTransformer) and model.patch_embed.feat_ratio() == 4
    model.reset_classifier(7)
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 7)


def test_an_images_logits_do_not_depend_on_the_batch() -> None:
    model, x = made(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


# Files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["vit", "vit-cpu"])
def test_a_file_of_its_tensors_finds_the_cards_recipe(tmp_path: Path, recipe: str) -> None:
    card = load_card("cifar10")
    model, x = made(**card.bases[recipe].args), torch.rand(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    base = load(card, tmp_path / "w.safetensors")
    assert base.architecture["architecture"] == "vit_earlyconv"
    assert base.architecture["args"] == card.bases[recipe].args
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (card.mean, card.std))
    with torch.no_grad():
        torch.testing.assert_close(base.module(x), model((x - mean) / std))


def test_a_folder_of_timm_is_a_base(tmp_path: Path) -> None:
    args = {"stem_width": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model, x = made(**args), torch.rand(2, 3, 32, 32)
    save_for_hf(model, str(tmp_path / "mine"), model_args=args, safe_serialization=True)
    base = load(load_card("cifar10"), tmp_path / "mine")
    config: Any = model.pretrained_cfg
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(base.module(x), model((x - mean) / std))


@pytest.mark.parametrize("preset", ["quick", "cpu"])
def test_its_presets_of_cifar10_promise_at_most_a_fifth_of_a_gflop(preset: str) -> None:
    card = load_card("cifar10")
    plan = recipe_base(card, card.presets[preset].base)
    module = plan.fresh(10).eval()  # first, since timm measures the stem with an image
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.rand(1, 3, 32, 32))
    attention = 2 * plan.args["depth"] * 2 * 64**2 * plan.args["embed_dim"]
    assert counter.get_total_flops() + attention <= 0.2e9


# Defenses --------------------------------------------------------------------------------------------

# What certifies after training under noise: statistics of batch norms of the base, or of noisy training images.
KEEP = ("none", "head", "bitfit", "lora", "lora:qv", "prompt", "adapter")
OWN = ("full", "retrain")


@pytest.fixture(scope="module")
def small() -> Card:
    card = load_card(TINY)
    recipe = Recipe("vit_earlyconv", args=SMALL, schedule={"epochs": 4, "batch": 32, "lr": 4e-3})
    return Card(**{**vars(card), "bases": {"vit": recipe}, "presets": dict(card.presets)})


@pytest.fixture(scope="module")
def base(small: Card, tmp_path_factory: pytest.TempPathFactory) -> LocalBase:
    train, validation = load_splits(small, "train", "validation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CERTBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = load_base(small, "vit", train.first(200), validation, CPU, lambda *_: None)
    assert isinstance(found, LocalBase)
    return found


def fitted(name: str, small: Card, base: LocalBase, folder: Path, patch: pytest.MonkeyPatch) -> Defense:
    """Train a defense, or load it from the cache in ``folder``."""
    patch.setenv("CERTBENCH_CACHE", str(folder))
    patch.setattr("bench.runs.plan.load_card", lambda _: small)
    name, _, targets = name.partition(":")
    settings = (f"targets={targets}",) if targets else ()
    (plan,) = make_plans(RunOptions(defenses=name, dataset=TINY, sigma="0.5", base="vit", settings=settings))
    (train,) = load_splits(small, "train")
    return fitting.fit(plan, base, train.first(200), CPU, lambda *_: None).defense


def statistics(module: nn.Module) -> list[Tensor]:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return [v for m in norms for v in (m.running_mean, m.running_var) if v is not None]


@pytest.mark.parametrize("name", [*KEEP, *OWN])
def test_frozen_batch_norms_keep_the_bases_statistics_and_trained_ones_take_those_of_noisy_images(
    small: Card, base: LocalBase, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, clean = state_sha256(base.module), statistics(base.module)
    defense = fitted(name, small, base, tmp_path, monkeypatch)
    found = [base.module] if name == "none" else [defense]
    kept = [torch.equal(a, b) for a, b in zip(clean, statistics(found[0]), strict=True)]
    assert len(clean) == 8 and (all(kept) if name in KEEP else not any(kept))
    assert state_sha256(base.module) == before
    # What certifies is loaded from the cache: the same function, statistics included.
    again = fitted(name, small, base, tmp_path, monkeypatch)
    for one, other in zip(statistics(defense), statistics(again), strict=True):
        assert torch.equal(one, other)
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(defense(x, None), again(x, None))
