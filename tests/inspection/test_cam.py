"""Grad-CAM: the layer that is chosen, maps computed by hand, and how maps overlap."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.globalstate import fixed_rng
from bench.inspection.cam import NoMap, maps, overlap, seen_by, target_of
from bench.models import architectures  # noqa: F401 - registers certbench's own
from defenses.prompt import Prompted

pytest.importorskip("pytorch_grad_cam", reason="pip install 'certbench[inspect]'")
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convnet whose last stage is a mean over 2x2 pixels times 1 and -1, pooled and weighed by hand."""

    def __init__(self, weights: list[list[float]]) -> None:
        super().__init__()
        self.stem = nn.Identity()
        self.stage = nn.Conv2d(1, 2, 2, stride=2, bias=False)
        self.stage.weight.data = torch.stack([torch.full((1, 2, 2), 0.25), torch.full((1, 2, 2), -0.25)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.stage(self.stem(x))).flatten(1))
        return out


def by_hand(coarse: Tensor) -> Tensor:
    """Cut at 0, scale to [0, 1], enlarge to 8x8, scale again: what is drawn of a weighted sum [B, h, w]."""

    def scaled(rows: Tensor) -> Tensor:
        rows = rows - rows.amin((1, 2), keepdim=True)
        return rows / rows.amax((1, 2), keepdim=True).clamp(min=1e-7)

    large = F.interpolate(scaled(coarse.clamp(min=0))[:, None], (8, 8), mode="bilinear", align_corners=False)
    return scaled(large[:, 0])


@pytest.mark.parametrize("label", [0, 1])
def test_the_map_of_a_convnet_is_the_one_computed_by_hand(label: int) -> None:
    net = Net([[3.0, 1.0], [1.0, 3.0]]).eval().requires_grad_(False)
    target = target_of(net, lambda: net(X))
    assert (target.name, target.size, target.reshape) == ("stage", (4, 4), None)
    pooled = F.avg_pool2d(X, 2)[:, 0]
    # The gradient of the logit by each position is the weight / 16: 3 - 1 for the first class, 1 - 3 for the second.
    expected = by_hand((2 if label == 0 else -2) / 16 * pooled)
    found = np.stack(maps(net, target, X, label))
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert bool(found.max() == 0) is (label == 1)  # nothing speaks for the second class


@pytest.mark.parametrize("tokens", ["class", "none", "prompts"])
def test_the_map_of_a_vision_transformer_weighs_the_patches_before_its_last_attention(tokens: str) -> None:
    with fixed_rng(0):
        plain = tokens == "none"
        vit = VisionTransformer(
            8, 2, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2,
            class_token=not plain, global_pool="avg" if plain else "token",
        )  # fmt: skip
        if tokens == "prompts":
            vit.blocks = Prompted(vit.blocks, torch.randn(2, 5, 16), 1, 0.0)  # type: ignore[assignment]
    vit.eval().requires_grad_(False)
    target = target_of(vit, lambda: vit(X))
    assert target.name == ("blocks.blocks.1.norm1" if tokens == "prompts" else "blocks.1.norm1")
    assert target.size == (4, 4)

    kept: list[Tensor] = []
    hook = target.layer.register_forward_hook(lambda m, i, out: kept.append(out.requires_grad_()) or kept[0])
    logits = vit(X)
    (grads,) = torch.autograd.grad(logits[:, 2].sum(), kept[0])
    hook.remove()
    first = {"class": 1, "none": 0, "prompts": 6}[tokens]
    assert kept[0].shape[1] == first + 16
    patches, weights = kept[0].detach()[:, first:], grads[:, first:].mean(1, keepdim=True)
    expected = by_hand((patches * weights).sum(2).view(3, 4, 4))
    assert np.abs(np.stack(maps(vit, target, X, 2)) - expected.numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [("resnet18", "layer4", (2, 2)), ("resnet110", "layer3", (16, 16)), ("convnext_atto", "stages", (2, 2))],
)
def test_the_layer_of_a_convnet_is_its_last_stage(name: str, layer: str, size: tuple[int, int]) -> None:
    x, net = torch.rand(1, 3, 64, 64), timm.create_model(name).eval()
    with torch.no_grad():
        target = target_of(net, lambda: net(x))
    assert (target.name, target.size) == (layer, size)


def test_the_layer_of_a_small_vit_with_early_convolutions_and_of_a_small_image() -> None:
    vit = timm.create_model("vit_earlyconv", class_token=False, global_pool="avg", depth=2).eval()
    with torch.no_grad():
        target = target_of(vit, lambda: vit(torch.rand(1, 3, 32, 32)))
    assert (target.name, target.size) == ("blocks.1.norm1", (8, 8))
    net = timm.create_model("resnet18", in_chans=1).eval()
    with torch.no_grad():  # 8x8 pixels leave one position to the last three stages
        assert target_of(net, lambda: net(X)).name == "layer1"


def test_models_without_a_map_are_named() -> None:
    for net, why in (
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), "Sequential has no stage of convolutions"),
        (timm.create_model("mixer_s32_224", img_size=32, in_chans=1), "MlpMixer has no stage of convolutions"),
    ):
        x = torch.rand(1, 1, 32, 32) if "Mixer" in why else X
        with pytest.raises(NoMap, match=why), torch.no_grad():
            target_of(net.eval(), partial(net, x))


def test_the_classifier_is_the_one_that_is_called_once() -> None:
    a, b = nn.Identity(), nn.Identity()
    assert seen_by([a, b], lambda: b(X))[0] is b
    with pytest.raises(NoMap, match="not those of a base"):
        seen_by([a], lambda: None)
    with pytest.raises(NoMap, match="2 times"):
        seen_by([a, b], lambda: (a(X), b(X)))


def test_equal_maps_overlap_fully_and_disjoint_ones_not_at_all() -> None:
    one = np.arange(100, dtype=np.float32).reshape(10, 10)
    assert overlap(one, one) == pytest.approx((1, 1))
    assert overlap(one, one[::-1, ::-1]) == pytest.approx((0, -1))
    assert all(map(math.isnan, overlap(one, np.zeros_like(one))))
    few = np.zeros((10, 10), np.float32)
    few[0, :5] = 1  # fewer than 20% above 0: zeros are not among the highest
    assert overlap(few, one)[0] == 0 and overlap(few, few)[0] == 1


@given(st.integers(0, 2**32 - 1))
def test_overlap_is_symmetric_and_between_0_and_1(seed: int) -> None:
    a, b = np.random.default_rng(seed).random((2, 6, 6)).astype(np.float32)
    found = overlap(a, b)
    assert found == pytest.approx(overlap(b, a)) and 0 <= found[0] <= 1 and -1 <= found[1] <= 1


def test_unrelated_maps_overlap_as_the_page_says() -> None:
    rng = np.random.default_rng(0)
    found = [overlap(*rng.random((2, 20, 20)).astype(np.float32))[0] for _ in range(500)]
    # Two sets of 80 of 400 pixels; the mean of 500 has a standard error of about .001.
    assert abs(np.mean(found) - 0.2 / 1.8) < 0.005
