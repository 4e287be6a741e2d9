"""The label of each class: natural order of folders, names in Parquet files, Unicode forms; entries left out."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.data.card import Card
from bench.data.datasets import load_card, load_split, load_splits
from bench.errors import BenchError
from tests.helpers.madeup import png

CARD = """
name = "mine"
shape = [3, 8, 8]
{classes}
source = {{ reader = "{reader}", folder = "data", train = "{train}", test = "{test}" }}
"""
E_ACUTE, DECOMPOSED = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")


def refused(card: Callable[[], Card]) -> str:
    with pytest.raises(BenchError) as e:
        load_splits(card(), "train", "test")
    assert "\n" not in str(e.value)
    return str(e.value)


# Folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Callable[[], Card]]:
    """Make class folders of two pictures each in train and test; return a function that loads the card."""

    def make(train: Sequence[str], classes: str = "", test: Sequence[str] | None = None) -> Callable[[], Card]:
        for part, names in (("train", train), ("test", train if test is None else test)):
            for name in names:
                folder = tmp_path / "data" / part / name
                folder.mkdir(parents=True)
                for i in range(2):
                    (folder / f"{i}.png").write_bytes(png())
        text = CARD.format(classes=classes, reader="folder", train="train", test="test")
        (tmp_path / "mine.toml").write_text(text)
        return lambda: load_card(str(tmp_path / "mine.toml"))

    return make


NUMBERS = ["0", "1", "2", "9", "10", "11", "100"]


@pytest.mark.parametrize("prefix", ["", "c", "Class ", "run2-"])
@pytest.mark.parametrize("classes", ["", "classes = 7"])
def test_numbered_folders_are_in_natural_order(
    folders: Any, prefix: str, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [prefix + number for number in NUMBERS]
    card = folders(names[::-1], classes)()
    if not classes:
        assert card.classes == tuple(names)
    train, test = load_splits(card, "train", "test")
    assert test.names == tuple(names)
    assert test.labels.tolist() == sorted([*range(7)] * 2)
    for split in (train, test):  # files of class k are labelled k
        images: Any = split.images
        for row, label in zip(images.rows, split.labels, strict=True):
            assert names[label].encode() + b"/" in images.stamp(row)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"natural order, as in timm: class 2 is '{prefix}2' (by characters" in said and f"be '{prefix}10')" in said
    assert "natural order" in train.origin


def test_the_order_is_timms(folders: Any) -> None:
    from timm.utils.misc import natural_key

    names = ["Zebra", "apple", "Banana", "x10y2", "x9y10", "x9y9", "n01", "n1b", "7", "70", "8"]
    assert list(folders(names)().classes) == sorted(names, key=natural_key)


def test_a_cards_own_order_is_kept_without_a_remark(folders: Any, capsys: pytest.CaptureFixture[str]) -> None:
    card = folders(["c10", "c2", "c1"], 'classes = ["c10", "c1", "c2"]')()
    assert load_split(card, "train").names == ("c10", "c1", "c2")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("train", "classes", "test", "message"),
    [
        (["a", "b", "c"], "", ["a", "b"], "test: 2 class folders, the card has 3 classes; missing: 'c'"),
        (["a", "b"], "", ["a", "b", "x"], "test: 3 class folders, the card has 2 classes; not in the card: 'x'"),
        (["a", "b"], 'classes = ["a", "B"]', None, "not in the card: 'b'; missing: 'B'"),
        (["a", "b", "c"], "classes = 2", None, "train: 3 class folders, the card has 2 classes; 'a', 'b', 'c'"),
        (["a", "b"], "classes = 3", None, "train: 2 class folders, the card has 3 classes; 'a', 'b'"),
        (["a", "b"], 'classes = ["a", "b", "c"]', None, "missing: 'c'"),
        (["a"], "", None, "only one class folder, 'a'; a classifier needs at least two classes"),
        ([f"k{i}" for i in range(9)], 'classes = ["a", "b"]', None, "'k0', 'k1', 'k2', 'k3', 'k4' and 4 more"),
    ],
)
def test_a_message_names_the_folder(
    folders: Any, train: list[str], classes: str, test: list[str] | None, message: str
) -> None:
    assert message in refused(folders(train, classes, test))


@pytest.mark.parametrize("extra", ["__MACOSX", "notes"])
def test_a_folder_without_pictures_is_named(folders: Any, tmp_path: Path, extra: str) -> None:
    card = folders(["red", "green", "blue"], "classes = 3")
    (tmp_path / "data" / "train" / extra).mkdir()
    (tmp_path / "data" / "train" / extra / "._0.png").write_bytes(b"")
    assert f"4 class folders, the card has 3 classes; without pictures: '{extra}'" in refused(card)
    without = folders([], "")
    assert f"{extra}: no pictures in this class folder, left out: 1 hidden" in refused(without)


@pytest.mark.parametrize("stored", [E_ACUTE, DECOMPOSED])
@pytest.mark.parametrize("written", [E_ACUTE, DECOMPOSED])
def test_unicode_forms_of_a_name_are_equal(folders: Any, stored: str, written: str, tmp_path: Path) -> None:
    card = folders([stored, "tea"], f'classes = ["tea", "{written}"]')
    assert load_split(card(), "test").labels.tolist() == [0, 0, 1, 1]
    os.rename(tmp_path / "data", tmp_path / stored)
    text = (tmp_path / "mine.toml").read_text().replace('"data"', f'"{written}"')
    (tmp_path / "mine.toml").write_text(text)
    assert load_split(card(), "test").labels.tolist() == [0, 0, 1, 1]


def test_two_folders_with_forms_of_one_name_are_refused(folders: Any, tmp_path: Path) -> None:
    card = folders([E_ACUTE, "tea"])
    try:
        (tmp_path / "data" / "train" / DECOMPOSED).mkdir()
    except FileExistsError:
        pytest.skip("a file system that keeps no two forms of a name")
    assert "differ only in their Unicode form" in refused(card)
    (tmp_path / "mine.toml").write_text(
        CARD.format(classes=f'classes = ["{E_ACUTE}", "{DECOMPOSED}"]', reader="folder", train="train", test="test")
    )
    assert "at least two, all different" in refused(card)


def test_what_is_left_out_is_counted(folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = folders(["cat", "dog"])
    root = tmp_path / "data" / "train"
    for name in ("a.avif", "b.AVIF", "c.heic", "notes.txt", ".DS_Store", "README"):
        (root / "cat" / name).write_bytes(b"")
    for name in ("a.jfif", "b.jpe", "c.JPG", "d.pbm"):
        (root / "dog" / name).write_bytes(png(kind="JPEG"))
    (root / "dog" / "more").mkdir()
    (root / "dog" / "more" / "3.png").write_bytes(png())
    (root / "stray.png").write_bytes(png())
    (root / "gone").symlink_to(root / "nowhere")
    (root / ".ipynb_checkpoints").mkdir()
    train = load_split(card(), "train")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for kind in ("1 .avif", "1 .heic", "1 .txt", "2 hidden", "1 without a suffix"):
        assert kind in said
    assert "1 folders in class folders" in said and "2 outside of class folders" in said
    assert "8 pictures (4 .png, 1 .jfif, 1 .jpe, 1 .jpg, 1 .pbm), left out: " in said.replace("\n", "")
    assert "left out" in train.origin
    assert train.integers(slice(None)).shape == (7, 3, 8, 8)


def test_links_are_followed_and_nested_folders_are_left_out(folders: Any, tmp_path: Path) -> None:
    card = folders(["cat", "dog"])
    root = tmp_path / "data" / "train"
    os.rename(root / "cat", tmp_path / "store")
    (root / "cat").symlink_to(tmp_path / "store")
    assert load_split(card(), "train").names == ("cat", "dog")
    (root / "again").symlink_to(root / "dog")
    assert "'again' and 'dog' are links to one folder; remove one" in refused(card)
    (root / "again").unlink()
    (tmp_path / "store" / "link.png").symlink_to(root / "gone.png")
    with pytest.raises(BenchError, match=r"link\.png: not a file"):
        load_split(card(), "train").integers(slice(None))
    os.rename(root / "dog", root / "x")
    (root / "dog").mkdir()
    os.rename(root / "x", root / "dog" / "puppy")
    assert "dog: no pictures in this class folder, left out: 1 folders in class folders" in refused(card)


# Parquet ---------------------------------------------------------------------------------------------


@pytest.fixture
def parquets(tmp_path: Path) -> Callable[..., Callable[[], Card]]:
    """Write train and test files whose ClassLabel has the given names; None: no metadata."""

    def make(train: list[str] | None, classes: str, test: list[str] | None = None) -> Callable[[], Card]:
        (tmp_path / "data").mkdir(exist_ok=True)
        for part, names in (("train", train), ("test", test)):
            table = pa.table({"image": [png() for _ in range(6)], "label": [0, 1, 2] * 2, "coarse": [0, 1, 0] * 2})
            if names is not None:
                label = {"names": names, "_type": "ClassLabel"}
                features = {"image": {"_type": "Image"}, "label": label}
                features["coarse"] = {"names": ["x", "y"], "_type": "ClassLabel"}
                info = json.dumps({"info": {"features": features}})
                table = table.replace_schema_metadata({"huggingface": info})
            pq.write_table(table, tmp_path / "data" / f"{part}.parquet")
        text = CARD.format(classes=f"classes = {classes}", reader="parquet", train="train.parquet", test="test.parquet")
        (tmp_path / "mine.toml").write_text(text)
        return lambda: load_card(str(tmp_path / "mine.toml"))

    return make


NAMED = '["cat", "dog", "owl"]'


def test_class_labels_are_matched_to_the_card_by_name(parquets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    card = parquets(["owl", "cat", "dog"], NAMED, ["cat", "dog", "owl"])()
    train, test = load_splits(card, "train", "test")
    assert test.labels.tolist() == [0, 1, 2] * 2
    images: Any = train.images
    assert train.labels.tolist() == [(2, 0, 1)[row % 3] for row in images.rows]
    assert train.names == test.names == ("cat", "dog", "owl")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "train.parquet: labels matched to the card's classes by name: its 0 is the card's 2, 'owl'" in said
    assert "matched to the card's classes by name" in train.origin and test.origin == "data"


@pytest.mark.parametrize("names", [["cat", "dog", "owl"], ["Cat", " dog", "OWL"], None])
def test_class_labels_in_the_cards_order_change_nothing(
    parquets: Any, names: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = load_splits(parquets(names, NAMED, ["cat", "dog", "owl"])(), "train", "test")
    assert test.labels.tolist() == [0, 1, 2] * 2
    assert (train.origin, capsys.readouterr().err) == ("data", "")


def test_class_labels_that_clash_with_the_card_are_refused(parquets: Any) -> None:
    line = refused(parquets(["cat", "dog", "bat"], NAMED))
    assert "only in the file: 'bat'; only in the card: 'owl'" in line and "train.parquet" in line
    assert "name 2 classes, the card has 3" in refused(parquets(["cat", "dog"], NAMED))
    assert "name 4 classes, the card has 3" in refused(parquets(["a", "b", "c", "d"], "3"))
    assert "name 3 classes, the card has 3 classes" in refused(parquets(["a", "a", "b"], '["a", "b", "c"]'))


def test_a_card_that_numbers_its_classes_uses_the_names_of_the_file(parquets: Any) -> None:
    train, test = load_splits(parquets(["owl", "cat", "dog"], "3", ["owl", "cat", "dog"])(), "train", "test")
    assert train.names == ("owl", "cat", "dog")
    assert test.labels.tolist() == [0, 1, 2] * 2
    line = refused(parquets(["owl", "cat", "dog"], "3", ["cat", "owl", "dog"]))
    assert "files name class 0 'owl' and 'cat'; list the names under classes in the card" in line
    # Numbers that a folder of numbered classes gave in the order of their characters.
    split = load_split(parquets(["2", "0", "1"], "3", None)(), "train")
    assert split.names == ("0", "1", "2")


def test_the_label_column_decides_which_names_count(parquets: Any, tmp_path: Path) -> None:
    card = parquets(["cat", "dog", "owl"], '["y", "x"]')
    text = (tmp_path / "mine.toml").read_text().replace('folder = "data"', 'folder = "data", label = "coarse"')
    (tmp_path / "mine.toml").write_text(text)
    train = load_split(card(), "train")
    images: Any = train.images
    assert train.labels.tolist() == [(1, 0, 1)[row % 3] for row in images.rows]


@pytest.mark.parametrize(
    "metadata",
    [b"\xff", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": [1, 2]}}}}', b"[" * 100_000],
)
def test_metadata_that_names_no_classes_is_ignored(parquets: Any, tmp_path: Path, metadata: bytes) -> None:
    card = parquets(None, NAMED)
    table = pq.read_table(tmp_path / "data" / "train.parquet").replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    assert load_split(card(), "train").names == ()
