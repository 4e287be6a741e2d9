"""Checkpoints of transformers' ViTForImageClassification, made by the library itself, as bases; and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Access
from bench.models.load import untrained_base
from bench.models.names import Given, choose_base
from bench.models.summary import describe
from tests.helpers.hubserver import COMMIT, HubServer
from tests.helpers.timmfolders import CPU, card, load, reconfigure, rewrite

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": 4,
    "id2label": {0: "red", 1: "green", 2: "blue"},
}


def write(folder: Path, mean: float = 0.3, std: float = 0.7, **config: Any) -> nn.Module:
    """Write a folder with transformers' own save_pretrained; weights and biases are random, and none is 0 or 1."""
    torch.manual_seed(1)
    made = transformers.ViTConfig(**(SMALL | config))
    model: nn.Module = transformers.ViTForImageClassification(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)  # type: ignore[operator]
    sides: Any = made.image_size
    height, width = sides if isinstance(sides, list) else [sides] * 2
    values: dict[str, Any] = {"image_mean": [mean] * 3, "image_std": [std] * 3, "resample": 3}
    transformers.ViTImageProcessor(size={"height": height, "width": width}, **values).save_pretrained(folder)
    return model


def logits(model: nn.Module, x: Tensor, mean: float = 0.3, std: float = 0.7) -> Tensor:
    """Return the library's own logits of pixels."""
    with torch.no_grad():
        out: Tensor = model((x - mean) / std).logits
    return out


def processor_of(folder: Path, **changes: Any) -> Path:
    """Change a folder's preprocessor_config.json."""
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def refusal(base: Path) -> str:
    with pytest.raises(BenchError) as e:
        load(card(), base)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (3, 8, 8)),
        ({"qkv_bias": False}, (3, 8, 8)),
        ({"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 100}, (3, 8, 8)),
        ({"image_size": 12, "patch_size": 3}, (3, 12, 12)),
        ({"image_size": 10, "patch_size": 4}, (3, 10, 10)),  # two rows of pixels are in no patch
        ({"image_size": [8, 16], "patch_size": [2, 4]}, (3, 8, 16)),
        ({"layer_norm_eps": 0.5}, (3, 8, 8)),
        ({"hidden_act": "gelu_new"}, (3, 8, 8)),
        ({"hidden_act": "gelu_pytorch_tanh"}, (3, 8, 8)),
        ({"hidden_act": "gelu_fast"}, (3, 8, 8)),
        ({"hidden_act": "quick_gelu"}, (3, 8, 8)),
        ({"hidden_act": "relu"}, (3, 8, 8)),
        ({"hidden_act": "silu"}, (3, 8, 8)),
    ],
)
def test_logits_equal_those_of_the_library(tmp_path: Path, config: dict[str, Any], shape: tuple[int, int, int]) -> None:
    model = write(tmp_path / "m", **config)
    base = load(card(shape=shape), tmp_path / "m")
    x = torch.rand(5, *shape)
    expected = logits(model, x)
    assert expected.std() > 0.1  # they depend on the image
    assert torch.allclose(base.module(x), expected, atol=1e-5)


def test_activations_and_epsilons_matter_to_that_test(tmp_path: Path) -> None:
    """Its tolerance distinguishes the two forms of gelu, and another epsilon."""
    model, x = write(tmp_path / "m"), torch.rand(5, 3, 8, 8)
    for change in ({"hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-3}):
        other = load(card(), reconfigure(tmp_path / "m", **change))
        assert not torch.allclose(other.module(x), logits(model, x), atol=1e-5)


def test_the_epsilon_is_the_models_and_part_of_its_identity(tmp_path: Path) -> None:
    write(tmp_path / "m")
    base = load(card(), tmp_path / "m")
    norms = {m.eps for m in base.module.modules() if isinstance(m, nn.LayerNorm)}
    assert norms == {1e-12} and base.identity()["args"]["norm_eps"] == 1e-12
    copied, fresh = base.view(Access.WEIGHTS).copy(), base.untrained(3)
    for made in (copied, fresh):
        assert {m.eps for m in made.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    other = load(card(), reconfigure(tmp_path / "m", layer_norm_eps=1e-6))
    assert other.sha256 != base.sha256


def test_names_of_modules_of_the_library_are_read_too(tmp_path: Path) -> None:
    """Of a state_dict that a training loop saved with safetensors: transformers 5 has other names than its files."""
    model, x = write(tmp_path / "m"), torch.rand(3, 3, 8, 8)
    rewrite(tmp_path / "m", lambda _: model.state_dict())
    assert torch.allclose(load(card(), tmp_path / "m").module(x), logits(model, x), atol=1e-5)


def test_labels_are_matched_to_the_cards_order(tmp_path: Path) -> None:
    model = write(tmp_path / "m", id2label={0: "Blue", 1: "red", 2: "green"})
    base, x = load(card(), tmp_path / "m"), torch.rand(4, 3, 8, 8)
    assert torch.allclose(base.module(x), logits(model, x)[:, [1, 2, 0]], atol=1e-5)
    assert "its logits are permuted into the order of card rgb" in describe(base)
    write(tmp_path / "n", id2label={0: "cat", 1: "dog", 2: "cow"})
    assert "config names 3 classes (label_names: cat, dog, cow)" in refusal(tmp_path / "n")


def test_unnamed_classes_of_the_default_number(tmp_path: Path) -> None:
    """With two classes transformers writes no id2label at all."""
    small = {k: v for k, v in SMALL.items() if k != "id2label"}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**small)).eval()
    model.save_pretrained(tmp_path / "m")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "m")
    base, x = load(card(classes=("no", "yes")), tmp_path / "m"), torch.rand(4, 3, 8, 8)
    assert torch.allclose(base.module(x), logits(model, x, 0.5, 0.5), atol=1e-5)
    assert "assumed to be in the order of card rgb" in describe(base)


def test_the_processors_values_are_used_and_stated(tmp_path: Path) -> None:
    write(tmp_path / "m", image_size=16)
    base = load(card(), tmp_path / "m")
    said = describe(base)
    assert "8x8 images are resized to 16x16" in said and "size: image_size in config.json" in said
    assert "mean 0.3, std 0.7 (from preprocessor_config.json)" in said
    assert "bicubic" in said and "interpolation: preprocessor_config.json)" in said  # Pillow's number 3
    assert base.meta["preprocessing"]["resampling"] == base.identity()["interpolation"] == "bicubic"
    assert base.identity()["mean"] == pytest.approx([0.3] * 3)
    base = load(card(), processor_of(tmp_path / "m", resample=2, do_normalize=False))
    assert base.meta["preprocessing"]["resampling"] == "bilinear"
    assert (base.identity()["mean"], base.identity()["std"]) == ([0] * 3, [1] * 3)
    # Older files have one number.
    assert load(card(), processor_of(tmp_path / "m", size=16)).meta["preprocessing"]["size"] == [16, 16]


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_images_are_resized_as_the_processor_does(tmp_path: Path, resample: int) -> None:
    """On pixels of 8 bits, which the processor rounds after each of the two directions."""
    model = write(tmp_path / "m", image_size=16, patch_size=8)
    processor = transformers.ViTImageProcessor.from_pretrained(processor_of(tmp_path / "m", resample=resample))
    levels = torch.randint(64, 192, (3, 3, 8, 8), dtype=torch.uint8)
    seen = processor(list(levels), return_tensors="pt")["pixel_values"]
    base = load(card(), tmp_path / "m")
    inside: list[Tensor] = []
    base.module.get_submodule("model").register_forward_pre_hook(lambda _, x: inside.append(x[0]))
    base.module(levels / 255)
    assert torch.allclose(inside[0], seen, atol=1.5 / 255 / 0.7)
    with torch.no_grad():
        assert torch.allclose(base.module(levels / 255), model(seen).logits, atol=0.3)


def test_a_processor_that_without_interpolation_takes_that_of_the_library(tmp_path: Path) -> None:
    write(tmp_path / "m", image_size=16)
    file = processor_of(tmp_path / "m") / "preprocessor_config.json"
    stated = json.loads(file.read_text())
    del stated["resample"]
    file.write_text(json.dumps(stated))
    assert transformers.ViTImageProcessor.from_pretrained(tmp_path / "m").resample == 2
    base = load(card(), tmp_path / "m")
    assert "resized to 16x16, bilinear (" in describe(base)
    assert "interpolation: transformers' default)" in describe(base)
    assert "interpolation 'lanczos' of its config cannot be computed" in refusal(
        processor_of(tmp_path / "m", resample=1)
    )


def test_half_precision_shards_and_unused_parts(tmp_path: Path) -> None:
    model = write(tmp_path / "m", hidden_dropout_prob=0.1).half()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")  # type: ignore[operator]
    (tmp_path / "m" / "model.safetensors").unlink()
    base, x = load(card(), tmp_path / "m"), torch.rand(3, 3, 8, 8)
    assert torch.allclose(base.module(x), logits(model.float(), x), atol=1e-5)
    assert "stored as float16, computed in float32" in describe(base)
    assert "training here does not use its hidden_dropout_prob" in describe(base)
    write(tmp_path / "n")
    pooler = {f"vit.pooler.dense.{kind}": torch.zeros(32) for kind in ("weight", "bias")}
    rewrite(tmp_path / "n", lambda state: state | pooler)
    assert "left out, since ViTForImageClassification does not use it: vit.pooler.dense.bias, ..." in describe(
        load(card(), tmp_path / "n")
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "swin", "architectures": ["SwinForImageClassification"]}, "transformers' swin (SwinForImage"),
        ({"architectures": ["ViTModel"]}, "transformers' vit (ViTModel); of these models only ViTForImage"),
        ({"architectures": 3}, "transformers' vit (3)"),
        ({"hidden_act": "mish"}, "hidden_act in its config: unknown activation 'mish'"),
        ({"hidden_act": 3}, "unknown activation '3'"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not 5 attention heads"),
        ({"head_dim": 16}, "is not 4 attention heads of one size"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 in its config must be a whole number"),
        ({"hidden_size": True}, "hidden_size True in its config must be a whole number"),
        ({"intermediate_size": 10**400}, "in its config must be a whole number, 1 to 65536"),
        ({"layer_norm_eps": 10**400}, "must be a number"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps nan must be a number"),
        ({"layer_norm_eps": -9}, "logits are not finite"),
        ({"image_size": 10**9}, "must be a side in pixels"),
        ({"patch_size": [4]}, "patch_size [4] must be a side in pixels"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps small must be a number"),
        ({"image_size": 16}, "resizes images to 8x8, and image_size in its config.json is 16x16"),
        ({"num_hidden_layers": 3}, "blocks.2.norm1.weight is missing"),
        ({"num_hidden_layers": 1}, "blocks.1.attn.proj.bias is unknown to the model"),
        ({"intermediate_size": 65}, "mlp.fc1.bias has shape [64], the model's has [65]"),
        ({"patch_size": 2}, "patch_embed.proj.weight has shape [32, 3, 4, 4]"),
        ({"id2label": {"0": "red", "1": "green"}}, "head.bias has shape [3], the model's has [2]"),
    ],
)
def test_what_does_not_map_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    write(tmp_path / "m")
    assert says in refusal(reconfigure(tmp_path / "m", **config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_rescale": False}, "does not scale pixels by 1/255"),
        ({"rescale_factor": 1 / 127.5}, "does not scale pixels by 1/255"),
        ({"size": {"height": 4, "width": 8}}, "resizes images to 4x8"),
        ({"do_center_crop": True, "crop_size": {"height": 6, "width": 6}}, "resizes images to 6x6"),
        ({"resample": 9}, "resample 9 is not one of Pillow's filters"),
        ({"resample": "bicubic"}, "resample bicubic is not one of"),
        ({"image_mean": 0.5}, "image_mean and image_std must be lists"),
        ({"image_mean": [0.5]}, "3 channels, but 1 values of mean"),
        ({"image_std": [0.5, 0.5, None]}, "image_std None must be a number"),
        ({"image_mean": None}, "has no preprocessor_config.json with its mean and std"),
    ],
)
def test_a_processor_that_prepares_images_otherwise_is_refused(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    write(tmp_path / "m")
    assert says in refusal(processor_of(tmp_path / "m", **change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if "query" not in k}, "unknown to the model"),
        (lambda s: s | {"vit.encoder.layer.0.extra.weight": torch.zeros(3)}, "layer.0.extra.weight is unknown"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("classifier")}, "head.weight is missing"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "is unknown to the model"),
    ],
)
def test_tensors_that_do_not_map_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    write(tmp_path / "m")
    assert says in refusal(rewrite(tmp_path / "m", change))


def test_a_model_without_head_is_refused(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**SMALL)).save_pretrained(tmp_path / "m")
    assert "transformers' vit (ViTModel)" in refusal(tmp_path / "m")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    assert "pickled weights are refused" in refusal(tmp_path / "m")


def test_without_a_processor_mean_and_std_are_asked_for(tmp_path: Path) -> None:
    model = write(tmp_path / "m", 0.1, 0.2)
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    assert "add it, or give --mean and --std" in refusal(tmp_path / "m")
    given = Given(normalisation=((0.1,) * 3, (0.2,) * 3))
    base, x = load(card(), tmp_path / "m", given=given), torch.rand(3, 3, 8, 8)
    assert torch.allclose(base.module(x), logits(model, x, 0.1, 0.2), atol=1e-5)
    assert "mean 0.1, std 0.2 (from --mean and --std)" in describe(base)


def test_files_of_a_folder_are_that_model(tmp_path: Path) -> None:
    write(tmp_path / "m")
    whole = load(card(), tmp_path / "m")
    assert load(card(), tmp_path / "m" / "model.safetensors").sha256 == whole.sha256
    save_file(load_file(tmp_path / "m" / "model.safetensors"), tmp_path / "m" / "best.safetensors")
    assert load(card(), tmp_path / "m" / "best.safetensors").sha256 == whole.sha256
    # As --weights of a base of the same description they fit; another is named.
    write(tmp_path / "n")
    given = Given(weights=tmp_path / "m" / "model.safetensors")
    assert load(card(), tmp_path / "n", given=given).sha256 == whole.sha256
    reconfigure(tmp_path / "n", num_attention_heads=2)
    with pytest.raises(BenchError, match=r"its config.json describes another model of vit_of_transformers than base n"):
        load(card(), tmp_path / "n", given=given)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a model of two commits' processors, and one without processor."""
    write(tmp_path / "pushed")
    files = {("model", "me/vit", f.name): f.read_bytes() for f in (tmp_path / "pushed").iterdir()}
    files |= {("model", "me/bare", name): v for (_, _, name), v in files.items() if "preprocessor" not in name}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_hub_id(hub: HubServer, tmp_path: Path) -> None:
    local = load(card(), tmp_path / "pushed")
    base = load(card(), "hf-hub:me/vit")  # type: ignore[arg-type]
    assert base.sha256 == local.sha256
    source = base.meta["source"]
    assert (source["id"], source["revision"], source["file"]) == ("me/vit", COMMIT, "model.safetensors")
    with pytest.raises(BenchError, match=r"no preprocessor_config.json with its mean and std; add it, or give --mean"):
        load(card(), "hf-hub:me/bare")  # type: ignore[arg-type]
    # An estimate fetches no weights.
    hub.requests.clear()
    assert untrained_base(card(), "hf-hub:me/vit", CPU).classes == 3
    assert not any("safetensors" in request for request in hub.requests)


def test_an_id_without_prefix_names_it() -> None:
    with pytest.raises(BenchError, match=r"give --base hf-hub:aaraki/vit-base-patch16-224-in21k-finetuned-cifar10"):
        choose_base(card(), "quick", "aaraki/vit-base-patch16-224-in21k-finetuned-cifar10")
