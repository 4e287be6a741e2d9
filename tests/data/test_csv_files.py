"""Tables of pictures in the layout of WILDS: parts, labels and domains, and one line for what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.data.datasets import choose, load_card, load_split, load_splits
from bench.errors import BenchError
from tests.helpers import shifted
from tests.helpers.madeup import png

SPLITS = ("train", "validation", "test-id", "test-ood")
CARD = """
name = "mine"
shape = [3, 8, 8]
classes = ["cat", "dog"]
[source]
reader = "csv"
folder = "data"
path = "{at}/{file}.png"
label = "kind"
train = { part = "a" }
validation = { part = "b" }
test = { part = ["c", 4] }
"""
ROWS = [["a", "x", "1", "cat"], ["b", "x", "2", "dog"], ["c", "y", "1", "dog"], ["4", "y", "2", "cat"]]
TITLES = ["part", "at", "file", "kind"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CERTBENCH_DATA", str(tmp_path))
    return tmp_path


def mine(root: Path, rows: list[list[str]] | None = None, text: str = CARD) -> str:
    """Write the card, its pictures and its table; return the card's file."""
    for at in "xy":
        (root / "data" / at).mkdir(parents=True, exist_ok=True)
        for file in "12":
            (root / "data" / at / f"{file}.png").write_bytes(png())
    shifted.table(root / "data" / "metadata.csv", TITLES, ROWS if rows is None else rows)
    (root / "mine.toml").write_text(text)
    return str(root / "mine.toml")


def test_camelyon17_is_split_by_hospital_as_wilds_does(data: Path) -> None:
    rows = shifted.camelyon(data, each=2)
    card = load_card("camelyon17")
    splits = dict(zip(SPLITS, load_splits(card, *SPLITS), strict=True))
    wanted = {
        "train": [r for r in rows if r[7] in (0, 3, 4) and r[8] == 0],
        "validation": [r for r in rows if r[7] == 1],
        "test-id": [r for r in rows if r[7] in (0, 3, 4) and r[8] == 1],
        "test-ood": [r for r in rows if r[7] == 2],
    }
    assert sum(map(len, wanted.values())) == len(rows)
    for name, split in splits.items():
        assert split.name == name and len(split) == len(wanted[name])
        assert split.domain_counts() == Counter(str(r[7]) for r in wanted[name])
        if name != "train":  # which is shuffled, as of every card
            assert split.labels.tolist() == [r[5] for r in wanted[name]]
    ood, row = splits["test-ood"], wanted["test-ood"][3]
    name = f"patient_{row[1]}_node_{row[2]}"
    file = data / "camelyon17_v1.0" / "patches" / name / f"patch_{name}_x_{row[3]}_y_64.png"
    np.testing.assert_array_equal(ood.integers([3])[0], np.asarray(Image.open(file)).transpose(2, 0, 1))
    assert ood.origin == "$CERTBENCH_DATA/camelyon17_v1.0/metadata.csv: center 2"
    assert splits["test-id"].origin.endswith("metadata.csv: center 0 or 3 or 4 and split 1")
    train = splits["train"]
    assert sorted(train.labels.tolist()) == sorted(r[5] for r in wanted["train"])
    assert Counter(ood.labels[choose(ood, "6")].tolist()) == {0: 3, 1: 3}
    with pytest.raises(BenchError, match="unknown split of camelyon17 'test'; did you mean test-id or test-ood"):
        load_split(card, "test")


def test_the_folder_of_the_cards_name_goes_before_the_published_one(data: Path) -> None:
    shifted.camelyon(data, "camelyon17_v1.0", each=1, size=8)
    shifted.camelyon(data, "camelyon17", each=2, size=8)
    assert len(load_split(load_card("camelyon17"), "test-ood")) == 8


def test_iwildcam_reports_the_rows_that_no_split_uses(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = shifted.iwildcam(data)
    card = load_card("iwildcam")
    train, validation, same, other = load_splits(card, *SPLITS)
    assert "rows in no part of the card: 3" in capsys.readouterr().err  # id_val
    assert "rows in no part of the card: 3" in train.origin
    for split, name in ((validation, "val"), (same, "id_test"), (other, "test")):
        assert split.labels.tolist() == [r[4] for r in rows if r[0] == name]
        assert split.domain_counts() == {str(r[1]): 1 for r in rows if r[0] == name}
        assert split.pixels([0]).shape == (1, 3, 224, 224)
        assert "shorter side resized to 224" in split.origin
    assert sorted(train.labels.tolist()) == sorted(r[4] for r in rows if r[0] == "train")


def test_labels_are_names_or_numbers_of_classes(tmp_path: Path) -> None:
    numbers = [[*row[:3], str(int(row[3] == "dog"))] for row in ROWS]
    for rows in (ROWS, numbers):
        test = load_split(load_card(mine(tmp_path, rows)), "test")
        assert test.labels.tolist() == [1, 0] and test.domain_counts() == {}
    # Numbers that name classes are names alone.
    years = CARD.replace('"cat", "dog"', '"1", "0"')
    assert load_split(load_card(mine(tmp_path, numbers, years)), "test").labels.tolist() == [0, 1]
    with pytest.raises(BenchError, match="line 4: kind is '2', none of the card's 2 classes"):
        load_split(load_card(mine(tmp_path, [*numbers[:2], ["c", "y", "1", "2"]], years)), "test")


def test_a_test_part_is_cut_from_train_unless_named_parts_exist(tmp_path: Path) -> None:
    rows = [["a", at, file, kind] for at, kind in (("x", "cat"), ("y", "dog")) for file in "12"]
    text = CARD.replace('test = { part = ["c", 4] }', "").replace('validation = { part = "b" }', "")
    card = load_card(mine(tmp_path, rows, text))
    assert [len(s) for s in load_splits(card, "train", "validation", "test")] == [2, 1, 1]
    card = load_card(mine(tmp_path, rows, text + "[source.parts]\ntest-b = { part = 'b' }\n"))
    assert [len(s) for s in load_splits(card, "train", "validation")] == [3, 1]
    with pytest.raises(BenchError, match="unknown split of mine 'test'"):
        load_split(card, "test")
    with pytest.raises(BenchError, match=r"the test-b part \(data/metadata.csv: part b\) is empty"):
        load_split(card, "test-b")


def line(root: Path, change: Callable[[str], str], split: str = "test", text: str = CARD) -> str:
    """The one line with which a changed table is refused."""
    card = mine(root, text=text)
    path = root / "data" / "metadata.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(BenchError) as e:
        load_split(load_card(card), split).integers()
    assert "\n" not in str(e.value) and str(e.value).startswith(str(root))
    return str(e.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("part,at", "teil,at", "no columns 'part'; it has 'teil', 'at', 'file', 'kind': correct the card's [source]"),
        ("file,kind", "file,at", "2 columns 'at'; it has"),
        ("kind", "class", "no columns 'kind'"),
        ("c,y,1,dog", "c,y,1,owl", "line 4: kind is 'owl', none of the card's 2 classes ('cat', 'dog')"),
        ("c,y,1,dog", "c,y,1,", "line 4: kind is '', none of the card's 2 classes"),
        ("c,y,1,dog", "c,y,1", "line 4: 3 values for 4 columns; correct the line"),
        ("c,y,1,dog", "c,y,1,dog,", "line 4: 5 values for 4 columns"),
        ("c,y,1,dog", "c,x,1,dog", "lines 2 and 4 name one picture, 'x/1.png'; remove one of them"),
        ("c,y,1,dog", "c,..,1,dog", "line 4: '../1.png' must be a path below the data folder"),
        ("c,y,1,dog", "c,/etc,1,dog", "line 4: '/etc/1.png' must be a path below"),
        ("c,y,1,dog", "c,y\\,1,dog", "line 4: 'y\\\\/1.png' must be a path below"),
        ("c,y,1,dog", "c,y,\0,dog", "line 4: "),
        ("c,y,1,dog", "c,y,9,dog", "y/9.png: not a file"),
        ("c,y,1,dog", 'c,y,"1"x,dog', "line 4: not CSV: "),
        ("c,y,1,dog", f'c,y,"{"1" * 140_000}",dog', "line 4: not CSV: field larger than field limit"),
    ],
)
def test_a_faulty_table_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert message in line(tmp_path, lambda text: text.replace(old, new, 1))


def test_more_faulty_tables(tmp_path: Path) -> None:
    assert "no columns 'x'; it has none" in line(tmp_path, lambda _: "", text=CARD.replace("{at}", "{x}"))
    both = CARD.replace('train = { part = "a" }', 'train = { at = "x" }')
    assert "line 3 is in train and in validation; correct the card's columns" in line(tmp_path, str, text=both)
    (tmp_path / "data" / "metadata.csv").write_bytes(b"part,at,file,kind\n\xff")
    with pytest.raises(BenchError, match="not UTF-8 at byte 18"):
        load_split(load_card(str(tmp_path / "mine.toml")), "test")
    (tmp_path / "data" / "metadata.csv").unlink()
    with pytest.raises(BenchError, match=r"metadata.csv: No such file or directory; it lists the pictures"):
        load_split(load_card(str(tmp_path / "mine.toml")), "test")


def test_a_missing_picture_of_train_is_reported_before_training(tmp_path: Path) -> None:
    card = load_card(mine(tmp_path))
    train = load_split(card, "train")
    before = train.sha256()
    (tmp_path / "data" / "x" / "1.png").write_bytes(png(size=(9, 9)))
    assert load_split(card, "train").sha256() != before
    (tmp_path / "data" / "x" / "1.png").unlink()
    with pytest.raises(BenchError, match=r"x/1.png: No such file or directory; .*metadata.csv names it"):
        load_split(card, "train").sha256()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('path = "{at}/{file}.png"', "", "source.csv.path: Field required"),
        ('train = { part = "a" }', "train = {}", "source.csv.train: "),
        ('train = { part = "a" }', "train = { part = 1.5 }", "source.csv.train.part.0: Input should be a valid string"),
        ('folder = "data"', 'archive = "../x"', "source.csv.archive: String should match"),
        ('folder = "data"', "file = '../x.csv'", "source.csv.file: '../x.csv' must be a path below the data folder"),
        ('classes = ["cat", "dog"]', "", "classes: missing; give a list of names"),
        ('test = { part = ["c", 4] }', "[source.parts]\nood = { part = 'c' }", "source.csv.parts.ood.[key]"),
        ('test = { part = ["c", 4] }', "[source.parts]\ntest-OOD = { part = 'c' }", "source.csv.parts.test-OOD.[key]"),
    ],
)
def test_a_faulty_card_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CARD
    with pytest.raises(BenchError) as e:
        load_card(mine(tmp_path, text=CARD.replace(old, new)))
    assert message in str(e.value)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abcd4"), st.sampled_from(["cat", "dog"])), min_size=1, max_size=12))
def test_every_row_is_in_the_part_it_names(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("rows")
    card = load_card(mine(root, [[part, "x", str(i), kind] for i, (part, kind) in enumerate(rows)]))
    found: dict[str, Any] = {"train": "a", "validation": "b", "test": "c4"}
    for split, parts in found.items():
        wanted = [("cat", "dog").index(kind) for part, kind in rows if part in parts]
        if not wanted:
            with pytest.raises(BenchError, match="is empty"):
                load_split(card, split)
            continue
        labels = load_split(card, split).labels.tolist()
        assert (sorted(labels), sorted(wanted)) == (sorted(wanted), sorted(labels))
        assert split == "train" or labels == wanted
