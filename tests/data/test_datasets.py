"""Cards: valid and invalid TOML files, and the splits of a card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.data.datasets import card_files, choose, load_card, load_split, load_splits, whole_train
from bench.data.split import Split
from bench.errors import BenchError

SHARED = Path(os.environ.get("CERTBENCH_SHARED") or Path(__file__).parents[3] / "shared")
CIFAR = SHARED / "data" / "cifar10"

MINE = """
name = "mine"
shape = [3, 8, 8]
classes = 3
[source]
reader = "parquet"
train = "train.parquet"
folder = "data"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_card_that_comes_with_certbench_is_valid_without_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CERTBENCH_DATA", raising=False)
    cards = {name: load_card(name) for name in card_files()}
    assert {name: len(card.classes) for name, card in cards.items()} == {
        **{"camelyon17": 2, "cifar10": 10, "digits": 10},
        **{"imagenet": 1000, "iwildcam": 182},
    }
    assert {card.name for card in cards.values()} == set(cards)
    # Part of every record's identity: readers may change, but these hashes must not.
    assert {name: card.sha256()[:12] for name, card in cards.items()} == {
        "camelyon17": "8b73918d5df7",
        "cifar10": "e50c4dacb626",
        "digits": "aaeb6740f84c",
        "imagenet": "cc7e438d0d21",
        "iwildcam": "be6dc2badd16",
    }


def test_the_split_of_digits_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    train, validation, test = load_splits(load_card("digits"), "train", "validation", "test")
    assert (len(train), len(validation), len(test)) == (997, 300, 500)
    assert train.sha256() == "10d2cdb3a192b79f1bfea81f8ab9dcc1908d3db9bbf332cf298fd1fa63fdc5fd"
    assert validation.sha256() == "81e7f14990de6b3efc1aa89808fa71def54ea4300cf7430b3d74b3881a67121e"
    assert test.sha256() == "2dc276db57edfef5e91e31ca2175613d77104f95f48d0d217debb58a11cab8e2"
    assert test.origin == "scikit-learn" and capsys.readouterr().err == ""
    assert test.sha256([1, 2]).startswith("7ac95d38fc88")
    assert test.integers([0, 1]).dtype == np.uint8
    np.testing.assert_array_equal(test.pixels([3]), test.integers([3]).astype(np.float32) / np.float32(16))


def test_a_minimal_card_has_defaults(tmp_path: Path) -> None:
    card = load_card(written(tmp_path, MINE))
    assert card.classes == ("0", "1", "2")
    assert (card.levels, card.mean, card.std) == (256, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert set(card.presets) == {"quick", "standard", "paper"}
    assert card.bases["vit"].args["patch_size"] == 1
    assert card.home == tmp_path
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = load_card(written(elsewhere, MINE.replace('"data"', '"/some/where/else"')))
    assert moved.sha256() == card.sha256()  # the hash does not depend on folders
    assert load_card(written(elsewhere, MINE.replace("train.p", "other.p"))).sha256() != card.sha256()


@pytest.mark.parametrize(("side", "patch"), [(32, 4), (28, 4), (224, 28), (30, 3), (8, 1)])
def test_the_default_base_sees_every_pixel(tmp_path: Path, side: int, patch: int) -> None:
    card = load_card(written(tmp_path, MINE.replace("[3, 8, 8]", f"[3, {side}, {side}]")))
    assert card.bases["vit"].args["patch_size"] == patch
    assert side % patch == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', 'name = "../mine"', "name: String should match pattern"),
        ('name = "mine"', "name = ", "not TOML"),
        ('name = "mine"', 'name = "mine"\nhome = "/"', "home: not a key of a card"),
        ('name = "mine"', 'name = "mine"\ncolour = 3', "colour: Unexpected keyword argument"),
        ('name = "mine"', 'name = "mine"\nmean = [0.5]', "mean: 1 values for 3 channels"),
        ('name = "mine"', 'name = "mine"\nlevels = 17', "levels: pictures have 256"),
        ('name = "mine"', 'name = "mine"\npreset = "best"', "preset = 'best' has no [presets.best] table"),
        ('name = "mine"', 'name = "mine"\nstd = [1, 1, inf]', "std.2"),
        ('name = "mine"', 'name = "mine"\nmean = [nan, 1, 1]', "mean.0"),
        ('name = "mine"', 'name = "mine"\nradii = [0, inf]', "radii.1"),
        ("[3, 8, 8]", "[2, 8, 8]", "shape: pictures have 1 or 3 channels, not 2"),
        ("[3, 8, 8]", "[3, 8]", "shape"),
        ("classes = 3", 'classes = ["a", "a"]', "classes: at least two, all different"),
        ("classes = 3", "classes = 1000000000", "classes: 1000000000: must be 2 to 100,000"),
        ("classes = 3", "", "classes: missing; give a list of names, or their number"),
        ('"parquet"', '"tsv"', "source: Input tag 'tsv'"),
        ('train = "train.parquet"', "", "source.parquet.train: Field required"),
        ('"train.parquet"', '"../train.parquet"', "must be a path below the data folder"),
        ('"train.parquet"', '"/etc/passwd"', "must be a path below the data folder"),
        ('folder = "data"', 'folder = "data"\nresize = 4', "source.resize: 4 is less than the shape's height or width"),
        ('folder = "data"', 'test = "t"\n[splits]\ntest = 5', "splits.test: the source has its own test part"),
        ('folder = "data"', "[presets.quick]\nn0 = 1\nn = 9\nexamples = 'every:0'", "presets.quick.examples"),
    ],
)
def test_a_faulty_card_is_one_line_naming_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINE
    with pytest.raises(BenchError) as e:
        load_card(written(tmp_path, MINE.replace(old, new)))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_digits_have_their_known_size_and_levels(tmp_path: Path) -> None:
    text = 'name = "d"\nshape = [3, 8, 8]\nclasses = 10\nsource = { reader = "sklearn:digits" }'
    with pytest.raises(BenchError, match="digits have shape"):
        load_split(load_card(written(tmp_path, text)), "train")


def test_a_preset_may_take_every_kth(tmp_path: Path) -> None:
    text = MINE + "[presets.quick]\nn0 = 100\nn = 1000\nexamples = 'every:20'"
    assert load_card(written(tmp_path, text)).presets["quick"].examples == "every:20"


@pytest.mark.parametrize("name", ["", "absent.toml", "."])
def test_no_such_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match="data set"):
        load_card(name)


def array_split(count: int) -> Split:
    integers = np.arange(count * 4, dtype=np.uint8).reshape(count, 1, 2, 2)
    return Split("test", integers, np.arange(count, dtype=np.int64) % 3, 256)


def test_a_split_of_an_array() -> None:
    split = array_split(9)
    assert len(split.first(4)) == 4
    assert split.first(0) is split
    assert split.first(4).sha256() == split.sha256([0, 1, 2, 3])
    assert split.sha256() == split.sha256(range(9)) != split.sha256(range(8))
    assert choose(split, "every:4") == [0, 4, 8]
    assert choose(split, "3") == [0, 1, 2]


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not CIFAR.is_dir():
        pytest.skip(f"no CIFAR-10 at {CIFAR}; CERTBENCH_SHARED says where shared/ is")
    monkeypatch.setenv("CERTBENCH_DATA", str(CIFAR.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return load_card("cifar10")


def test_cifar10_from_the_local_folder(cifar: Any) -> None:
    train, validation, test = load_splits(cifar, "train", "validation", "test")
    assert (len(train), len(validation), len(test)) == (45000, 5000, 9000)
    few = "9,000 rows of the test part, which has 10,000 in the complete data set"
    assert test.origin == f"$CERTBENCH_DATA/cifar10; {few}" and train.origin == "$CERTBENCH_DATA/cifar10"
    assert train.sha256().startswith("87510e381e2f") and test.sha256().startswith("ebda53663b6f")
    assert test.sha256(range(5)).startswith("6bdf22f12ec5")
    assert test.names == ()  # the file names no classes
    first = train.first(500)
    assert first.pixels(slice(None)).shape == (500, 3, 32, 32)
    assert 0.3 < first.pixels(slice(None)).mean() < 0.6
    assert set(first.labels.tolist()) == set(range(10))
    mean, std = first.pixels(slice(None)).mean((0, 2, 3)), first.pixels(slice(None)).std((0, 2, 3))
    np.testing.assert_allclose(mean, cifar.mean, atol=0.03)
    np.testing.assert_allclose(std, cifar.std, atol=0.03)
    images = validation.images
    assert not isinstance(images, np.ndarray)
    assert images.done.sum() == 500  # of 50,000, only accessed pictures are decoded
    # Train and validation share no row, and together are the train file.
    assert not isinstance(train.images, np.ndarray)
    assert len(set(train.images.rows.tolist()) | set(images.rows.tolist())) == 50000
    whole = whole_train(cifar, train, validation)
    assert not isinstance(whole.images, np.ndarray)
    assert sorted(whole.images.rows.tolist()) == list(range(50000))
    np.testing.assert_array_equal(whole.integers([44999, 45000]), [*train.integers([-1]), *validation.integers([0])])
    np.testing.assert_array_equal(whole.labels, [*train.labels, *validation.labels])
    assert len(choose(test, str(cifar.presets["paper"].examples))) == 450


def test_cifar10_has_the_same_hash_whatever_was_decoded_before(cifar: Any) -> None:
    one, other = load_split(cifar, "test"), load_split(cifar, "test")
    one.pixels(range(50, 90))
    assert one.sha256([60, 5]) == other.sha256([60, 5]) != other.sha256([5, 60])
    assert one.sha256() == other.sha256() != one.first(100).sha256()
    np.testing.assert_array_equal(one.integers([70, 70, 3]), other.integers([70, 70, 3]))
