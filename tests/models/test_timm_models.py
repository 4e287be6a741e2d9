"""Loaded tensors equal the stored ones, differences are reported, or the file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import Tensor

from bench.errors import BenchError
from bench.models.names import Given
from bench.models.summary import describe
from tests.helpers.timmfolders import VIT, card, load, reconfigure, rewrite, save

GAP = "vit_base_patch16_siglip_gap_224"  # a family that timm loads without strict
State = dict[str, Tensor]


def refusal(base: Path) -> str:
    with pytest.raises(BenchError) as e:
        load(card(), base)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", GAP])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if "blocks.1." not in k}, "blocks.1"),
        (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, "head.bias"),
        (lambda s: s | {"blocks.2.norm1.weight": torch.ones(16)}, "blocks.2.norm1.weight"),
        (lambda s: s | {"head.weight": (100 * s["head.weight"]).to(torch.int8)}, "head.weight is torch.int8"),
        (lambda s: {"module." + k: v for k, v in s.items()}, "prefix 'module.'"),
        (lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, "prefix 'module._orig_mod.'"),
        (lambda s: {"model." + k: v for k, v in s.items()} | {"loss.scale": torch.ones(1)}, "prefix 'model.'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[State], State], says: str
) -> None:
    save(tmp_path / "m", name, **VIT)
    rewrite(tmp_path / "m", change)
    assert says in refusal(tmp_path / "m")
    # A file without config.json is read by another path, which must refuse it too.
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "bare.safetensors")
    refusal(tmp_path / "bare.safetensors")


def test_the_command_in_the_refusal_removes_the_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m")
    before = load(card(), tmp_path / "m").sha256
    rewrite(tmp_path / "m", lambda s: {"_orig_mod." + k: v for k, v in s.items()})
    command = refusal(tmp_path / "m").partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(tmp_path / "m")
    exec(command, {})
    assert load(card(), tmp_path / "m").sha256 == before


def test_parts_that_the_model_lacks_are_reported(tmp_path: Path) -> None:
    save(tmp_path / "m", GAP, **VIT)
    before = load(card(), tmp_path / "m").sha256
    rewrite(tmp_path / "m", lambda s: s | {"attn_pool.latent": torch.ones(2)})
    base = load(card(), tmp_path / "m")
    assert base.sha256 == before
    assert "the model has no such part: attn_pool" in describe(base)
    assert base.meta["source"]["remarks"]


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float16, False), (torch.bfloat16, False), (torch.float64, True)])
def test_another_precision_is_reported_and_computed_in_float32(tmp_path: Path, dtype: torch.dtype, exact: bool) -> None:
    model = save(tmp_path / "m")
    before = load(card(), tmp_path / "m").sha256
    rewrite(tmp_path / "m", lambda s: {k: v.to(dtype) for k, v in s.items()})
    base = load(card(), tmp_path / "m")
    for key, value in model.state_dict().items():
        assert torch.equal(base.module.state_dict()[f"model.{key}"], value.to(dtype).float())
    assert (base.sha256 == before) == exact
    assert f"stored as {str(dtype).removeprefix('torch.')}, computed in float32" in describe(base)


def test_what_timm_resizes_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "m")
    reconfigure(tmp_path / "m", model_args=VIT | {"img_size": 16})
    said = describe(load(card(), tmp_path / "m"))
    assert "pos_embed resized from 1x5x16 to 1x17x16" in said
    assert "8x8 images are resized to 16x16, bicubic (size: its argument img_size; interpolation: config.json)" in said


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "dla46_c", "test_efficientnet"])
def test_every_familys_own_folder_loads_without_remarks(tmp_path: Path, name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    save_for_hf(model, str(tmp_path / "m"), safe_serialization=True)
    base = load(card(), tmp_path / "m")
    assert "remarks" not in base.meta["source"]
    for key, value in model.state_dict().items():
        assert torch.equal(base.module.state_dict()[f"model.{key}"], value), key


def test_shards_and_rounded_variants_are_read(tmp_path: Path) -> None:
    save(tmp_path / "m")
    whole = load(card(), tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    names = sorted(state)
    places: dict[str, str] = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, tmp_path / "m" / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert load(card(), tmp_path / "m").sha256 == whole.sha256
    # An index that omits a tensor, or names files elsewhere, is refused.
    index.write_text(json.dumps({"weight_map": {k: v for k, v in places.items() if k != names[0]}}))
    assert f"disagree on {names[0]}, which only one" in refusal(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {names[0]: "../m/x.safetensors"}}))
    assert "must name .safetensors files of its own folder" in refusal(tmp_path / "m")
    index.unlink()
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "m" / "model.fp16.safetensors")
    assert "stored as float16" in describe(load(card(), tmp_path / "m"))


def test_a_folder_whose_weights_have_another_name_names_them(tmp_path: Path) -> None:
    save(tmp_path / "m")
    whole = load(card(), tmp_path / "m").sha256
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "ema.safetensors")
    assert "it has ema.safetensors: give one of these as --base" in refusal(tmp_path / "m")
    # Then the folder's config.json describes that file.
    assert load(card(), tmp_path / "m" / "ema.safetensors").sha256 == whole


def test_a_file_of_a_timm_folder_is_that_folders_base(tmp_path: Path) -> None:
    save(tmp_path / "m")
    whole, file = load(card(), tmp_path / "m"), load(card(), tmp_path / "m" / "model.safetensors")
    assert file.sha256 == whole.sha256 and file.name == whole.name
    assert file.module.get_buffer("mean").flatten().tolist() == [0.5] * 3  # not the card's
    with pytest.raises(BenchError, match=r"its config.json says mean \(0.5, 0.5, 0.5\), and base vit has \(0.4, 0.5"):
        load(card(), "vit", given=Given(tmp_path / "m" / "model.safetensors"))  # type: ignore[arg-type]


def test_transformers_timm_folders_are_read_once_their_prefix_is_gone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.TimmWrapperConfig(
        architecture="test_vit", num_labels=3, id2label={0: "blue", 1: "red", 2: "green"}
    )
    transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "m")
    assert "prefix 'timm_model.'" in refusal(tmp_path / "m")
    rewrite(tmp_path / "m", lambda s: {k.removeprefix("timm_model."): v for k, v in s.items()})
    assert "permuted into the order of card rgb" in describe(load(card(), tmp_path / "m"))


def test_the_digits_baseline_is_unchanged() -> None:
    from bench.data.datasets import load_card

    root = Path(__file__).parents[2]
    base = load(load_card("digits"), root / "reports" / "baselines" / "digits-vit.safetensors")
    assert base.sha256 == "10e22ed79268e1483f61718cf9a5db6fd0c3c439d81f94052eb9150556ce9cd3"
