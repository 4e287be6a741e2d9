"""certbench's own architectures: their released parameters, names and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.data.datasets import load_card
from bench.models.architectures import timm
from bench.models.names import Given
from tests.helpers.norms import moved
from tests.helpers.timmfolders import load

PARAMETERS = 1_730_714  # of the released ResNet-110


def resnet(blocks: int = 18) -> nn.Module:
    """A network in eval mode whose batch norms are not the identity."""
    model: nn.Module = timm.create_model("resnet110", blocks=blocks).eval()
    return moved(model)


def computed(state: Mapping[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The released network's logits, from its tensors alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)

    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                x = norm(x, f"{name}.downsample.1")
            x = (x + y).relu()
    return F.avg_pool2d(x, 8).flatten(1) @ state["fc.weight"].T + state["fc.bias"]


def test_resnet110_has_the_released_parameters_and_names() -> None:
    state = timm.create_model("resnet110").state_dict()
    counted = {k: v for k, v in state.items() if "running" not in k and "tracked" not in k}
    assert sum(v.numel() for v in counted.values()) == PARAMETERS
    # A stem, 3 x 18 blocks of two layers each, two shortcuts, a head; each convolution with a batch norm.
    assert sum(v.ndim == 4 for v in counted.values()) == 1 + 3 * 18 * 2 + 2
    assert {k: tuple(v.shape) for k, v in counted.items() if ".1" not in k and "2." not in k and "bn" not in k} == {
        "conv1.weight": (16, 3, 3, 3),
        "layer1.0.conv1.weight": (16, 16, 3, 3),
        **{f"layer1.{i}.conv1.weight": (16, 16, 3, 3) for i in range(3, 10)},
        "layer3.0.conv1.weight": (64, 32, 3, 3),
        **{f"layer3.{i}.conv1.weight": (64, 64, 3, 3) for i in range(3, 10)},
        "layer3.0.downsample.0.weight": (64, 32, 1, 1),
        "fc.weight": (10, 64),
        "fc.bias": (10,),
    }
    assert state["layer2.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    # The released initialisation: normal, with variance 2 / (9 * width).
    weight = state["layer3.5.conv1.weight"]
    assert abs(float(weight.std()) / (2 / (9 * 64)) ** 0.5 - 1) < 0.02
    assert float(state["layer3.5.bn2.weight"].min()) == 1  # its last batch norms do not begin at zero


def test_resnet110_computes_the_released_function() -> None:
    model, x = resnet(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = computed(model.double().state_dict(), x.double(), 18), model(x.double())
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_its_head_can_be_replaced_as_in_timm() -> None:
    model, x = resnet(blocks=1), torch.rand(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    assert features.shape == (2, 64)
    head = model.get_classifier()  # type: ignore[operator]
    torch.testing.assert_close(model(x), head(features))
    model.reset_classifier(5)  # type: ignore[operator]
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)  # type: ignore[operator]
    torch.testing.assert_close(model(x), features)


def test_a_file_of_its_tensors_is_a_base_with_the_recipes_normalisation(tmp_path: Path) -> None:
    """As a released checkpoint is, once its pickle is converted and its prefixes are removed."""
    model, x = resnet(), torch.rand(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "cohen.safetensors")
    base = load(load_card("cifar10"), tmp_path / "cohen.safetensors")
    assert base.classes == 10
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    with torch.no_grad():
        expected = model((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
        torch.testing.assert_close(base.module(x), expected)
    said = "the recipe resnet110 that it fits, since cohen.safetensors states none: if it had others, give --mean and"
    assert base.meta["preprocessing"]["normalisation_from"].startswith(said)
    given = Given(normalisation=((0.5,) * 3, (0.25,) * 3))
    other = load(load_card("cifar10"), tmp_path / "cohen.safetensors", given=given)
    with torch.no_grad():
        torch.testing.assert_close(other.module(x), model((x - 0.5) / 0.25))
    assert other.meta["preprocessing"]["normalisation_from"] == "--mean and --std"
