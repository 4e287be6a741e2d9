"""Images are resized to a base's input as timm's own transform does it, and the base's identity says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Access
from bench.models.base import Classifier, LocalBase
from bench.models.names import Given, blueprint
from bench.models.resampling import METHODS
from bench.models.summary import describe
from tests.helpers.timmfolders import VIT, card, load, reconfigure, save

# From, to: enlarged by a whole and a broken number, shrunk, and one side of each. No new pixel lies between two old
# ones, where rounding would decide which is nearest.
SIZES = [((8, 8), (16, 16)), ((9, 9), (16, 16)), ((27, 27), (12, 12)), ((27, 9), (12, 20))]


def timms(size: tuple[int, int], interpolation: str) -> Any:
    """timm's transform for evaluation, of the whole picture."""
    return create_transform(
        (1, *size), interpolation=interpolation, mean=(0.0,), std=(1.0,), crop_pct=1.0, crop_mode="squash"
    )


def resized(x: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    return Classifier(nn.Identity(), (0.0,), (1.0,), size, interpolation)(x)


@pytest.mark.parametrize("interpolation", METHODS)
@pytest.mark.parametrize(("given", "size"), SIZES)
def test_images_are_resized_as_timm_resizes_pictures(
    interpolation: str, given: tuple[int, int], size: tuple[int, int]
) -> None:
    noisy = np.random.default_rng(0).normal(0.5, 0.5, given).astype(np.float32)
    # Pillow neither rounds nor clips pictures of floats.
    expected = timms(size, interpolation)(Image.fromarray(noisy))
    torch.testing.assert_close(
        resized(torch.from_numpy(noisy)[None, None], size, interpolation)[0], expected, atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("given", "size"), SIZES)
def test_images_are_resized_as_timm_resizes_tensors(
    interpolation: str, given: tuple[int, int], size: tuple[int, int]
) -> None:
    noisy = 0.5 + 0.5 * torch.randn(2, 1, *given)
    torch.testing.assert_close(
        resized(noisy, size, interpolation), timms(size, interpolation)(noisy), atol=2e-6, rtol=0
    )


def test_interpolations_differ() -> None:
    x = torch.rand(1, 1, 8, 8)
    one, two, three = (resized(x, (21, 21), name) for name in METHODS)
    assert min(float((a - b).abs().max()) for a, b in ((one, two), (one, three), (two, three))) > 0.05


ODD: dict[str, Any] = {**VIT, "img_size": 16}  # resized from 8x8


def stating(folder: Path, interpolation: str | None, **args: Any) -> LocalBase:
    """Load a base of random weights whose config states this interpolation."""
    if not folder.exists():
        save(folder, **(args or ODD))
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    reconfigure(folder, pretrained_cfg={**config, "interpolation": interpolation})
    return load(card(), folder)


def test_a_bases_config_decides(tmp_path: Path) -> None:
    model = save(tmp_path / "m", **ODD)
    x = torch.rand(2, 3, 8, 8)
    for name in METHODS:
        base = stating(tmp_path / "m", name)
        transform = create_transform(
            (3, 16, 16), interpolation=name, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode="squash"
        )
        if name == "nearest":
            rows = torch.arange(16) // 2
            seen = (x[:, :, rows][..., rows] - 0.5) / 0.5
        else:
            seen = transform(x)
        with torch.no_grad():
            torch.testing.assert_close(base.module(x), model(seen), atol=1e-5, rtol=0)
            # A linear probe, LoRA, joint training: copies resize alike.
            torch.testing.assert_close(base.view(Access.WEIGHTS).copy()(x), model(seen), atol=1e-5, rtol=0)
        assert base.meta["preprocessing"]["resampling"] == name
        said = f"resized to 16x16, {name} (size: its argument img_size; interpolation: config.json)"
        assert said in describe(base)


def test_a_base_that_resizes_by_another_interpolation_is_another_base(tmp_path: Path) -> None:
    bases = {name: stating(tmp_path / "m", name) for name in METHODS}
    assert len({base.sha256 for base in bases.values()}) == 3
    assert bases["bicubic"].identity()["interpolation"] == "bicubic"
    assert "interpolation" not in bases["bilinear"].identity()  # as before 0.2
    # Where images are not resized, an interpolation changes nothing, even one that could not be computed.
    same = {stating(tmp_path / "same", name, **VIT).sha256 for name in (*METHODS, "lanczos")}
    assert len(same) == 1


def test_identities_of_0_1_0_are_kept() -> None:
    """Hashes of 0.1.0: an 8x8 base that is not resized, and one that is, bilinearly."""
    recipes = {
        name: {"model": "vit_tiny_patch16_224", "args": {**VIT, "img_size": side}, "schedule": {"epochs": 0.1}}
        for name, side in (("same", 8), ("resized", 12))
    }
    made = card(bases=recipes)
    found = {}
    for name in recipes:
        plan = blueprint(made, name)
        module = plan.fresh(3)
        for value in module.state_dict().values():
            value.fill_(0.25)
        found[name] = plan.base(module, {}, torch.device("cpu")).sha256[:16]
    assert found == {"same": "f31e2d03cbe83b23", "resized": "707d6485a13ff056"}


def test_an_interpolation_that_no_config_states_is_timms_default(tmp_path: Path) -> None:
    base = stating(tmp_path / "m", None)
    assert base.meta["preprocessing"]["resampling"] == "bicubic"
    assert "interpolation: timm's default for vit_tiny_patch16_224)" in describe(base)


@pytest.mark.parametrize("name", ["lanczos", "random", "box"])
def test_an_interpolation_that_cannot_be_done_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        BenchError, match=rf"base m: interpolation '{name}' of its config cannot be computed .* set it"
    ) as e:
        stating(tmp_path / "m", name)
    assert "\n" not in str(e.value)


def test_weights_of_a_folder_that_resizes_otherwise_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", **ODD)
    recipe = {"vit": {"model": "vit_tiny_patch16_224", "args": ODD, "schedule": {"epochs": 0.1}}}
    made = card(bases=recipe, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(BenchError, match="says resampling bicubic, and base vit has bilinear; give --base"):
        load(made, Path("vit"), given=Given(weights=tmp_path / "m" / "model.safetensors"))
