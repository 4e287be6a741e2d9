"""A base's class names and the card's: logits are permuted, a remark is made, or the base is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.errors import BenchError
from bench.models.labels import card_order, stated_names
from bench.models.summary import describe
from tests.helpers.timmfolders import card, load, reconfigure, save

OTHER = ["blue", "red", "green"]  # the card's: red, green, blue


@pytest.mark.parametrize(
    "stated",
    [
        {"label_names": OTHER},
        {"labels": OTHER},
        {"label_names": ["n2", "n0", "n1"], "label_descriptions": {"n2": "blue, azure", "n0": "red", "n1": "green"}},
        {"id2label": {"0": "blue", "1": "red", "2": "green"}},
        {"label2id": {"red": 1, "green": 2, "blue": 0}},
        {"label_names": ["Blue", " red", "GREEN"]},
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_logits_are_permuted_into_the_cards_order(tmp_path: Path, stated: dict[str, Any], name: str) -> None:
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    save(tmp_path / "m", name, **args)
    x = torch.rand(4, 3, 8, 8)
    unnamed = load(card(), tmp_path / "m")
    named = load(card(), reconfigure(tmp_path / "m", **stated))
    assert torch.allclose(named.module(x), unnamed.module(x)[:, [1, 2, 0]], atol=1e-6)
    assert "its logits are permuted into the order of card rgb" in describe(named)
    assert "assumed to be in the order of card rgb" in describe(unnamed)
    assert named.sha256 != unnamed.sha256


def test_the_names_in_the_data_count_where_the_card_numbers_its_classes(tmp_path: Path) -> None:
    """Names of class folders or of a Parquet file, with ``classes = 3`` in the card."""
    save(tmp_path / "m")
    numbered, x = card(classes=("0", "1", "2")), torch.rand(4, 3, 8, 8)
    unnamed = load(numbered, tmp_path / "m")
    reconfigure(tmp_path / "m", label_names=OTHER)
    named = load(numbered, tmp_path / "m", names=("red", "green", "blue"))
    assert torch.allclose(named.module(x), unnamed.module(x)[:, [1, 2, 0]], atol=1e-6)
    with pytest.raises(BenchError, match="3 other names"):
        load(numbered, tmp_path / "m", names=("cat", "dog", "cow"))


def test_names_in_the_pretrained_cfg_count_too(tmp_path: Path) -> None:
    save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    reconfigure(tmp_path / "m", pretrained_cfg=config["pretrained_cfg"] | {"label_names": OTHER})
    assert "permuted into the order" in describe(load(card(), tmp_path / "m"))


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"label_names": ["cat", "dog", "cow"]}, "config names 3 classes (label_names: cat, dog, cow)"),
        ({"label_names": ["red", "green"]}, "names 2 classes"),
        ({"label_names": OTHER, "id2label": {"0": "red", "1": "green", "2": "blue"}}, "names its classes twice"),
        ({"label_names": ["red", "red", "blue"]}, "red, red, blue"),
        ({"id2label": {"1": "red", "2": "green", "3": "blue"}}, "must number its classes 0 to 2"),
        ({"label_names": "red"}, "must be a list of names"),
        ({"label_names": [["red"], {}, None]}, "must be a list of names"),
        ({"label2id": {"red": [1], "green": {}, "blue": None}}, "must number its classes"),
        ({"label_names": ["\x1b[2J" * 99, "b", "c"], "label_descriptions": [3]}, "config names 3 classes"),
    ],
)
def test_a_clash_is_refused(tmp_path: Path, stated: dict[str, Any], says: str) -> None:
    save(tmp_path / "m")
    with pytest.raises(BenchError) as e:
        load(card(), reconfigure(tmp_path / "m", **stated))
    assert says in str(e.value)


def test_a_clash_does_not_matter_where_the_head_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "m")
    reconfigure(tmp_path / "m", label_names=["cat", "dog", "cow"])
    assert "its head is replaced" in describe(load(card(), tmp_path / "m", probe=False))


def test_numbered_classes_and_placeholders() -> None:
    numbers = ("0", "1", "2")
    assert card_order("b", (("c", "a", "b"),), numbers, "x")[0] == [0, 1, 2]
    assert "numbers them" in card_order("b", (("c", "a", "b"),), numbers, "x")[1]
    assert card_order("b", (("2", "0", "1"),), numbers, "x")[0] == [1, 2, 0]
    with pytest.raises(BenchError):
        card_order("b", (("1", "2", "3"),), numbers, "x")
    assert stated_names("b", {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) == ()
    # Names that differ only in case and spaces are matched exactly.
    assert card_order("b", (("a_b", "a b"),), ("a b", "a_b"), "x")[0] == [1, 0]
