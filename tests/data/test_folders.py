"""Folders of pictures in ImageNet's layout: many sizes and modes, decoded in bounded memory."""

from __future__ import annotations

import os
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.data import pictures
from bench.data.datasets import load_card, load_split, load_splits
from bench.errors import BenchError
from tests.helpers.madeup import png

PHOTOS = """
name = "photos"
shape = [3, 24, 24]
[source]
reader = "folder"
folder = "photos"
test = "val"
resize = 28
[splits]
validation = 2
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Make a folder in ImageNet's layout, of pictures of many sizes, modes and formats."""
    kinds = [("RGB", (60, 40), "JPEG"), ("L", (31, 90), "JPEG"), ("CMYK", (50, 50), "JPEG"), ("RGBA", (28, 28), "PNG")]
    kinds += [("P", (24, 25), "PNG"), ("1", (100, 30), "PNG")]
    for part, each in (("train", 6), ("val", 3)):
        for name in ("n02", "n01", "n10"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(each):
                mode, size, kind = kinds[i]
                (folder / f"{i}.{'JPEG' if kind == 'JPEG' else 'png'}").write_bytes(png(mode, size, kind))
            (folder / "notes.txt").write_text("not a picture")
    (tmp_path / "photos.toml").write_text(PHOTOS)
    return tmp_path


def test_a_folder_of_photographs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = load_card(str(photos / "photos.toml"))
    assert card.classes == ("n01", "n02", "n10")
    train, validation, test = load_splits(card, "train", "validation", "test")
    assert (len(train), len(validation), len(test)) == (16, 2, 9)
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    resized = "shorter side resized to 28 (bilinear), centre cropped to 24x24"
    assert test.origin.endswith(resized) and train.origin.endswith(resized)
    assert capsys.readouterr().err.count(resized) == 1
    assert train.pixels(slice(None)).shape == (16, 3, 24, 24)
    # The first is 60x40: the shorter side becomes 28, and the centre is cropped to 24x24.
    image = Image.open(photos / "photos" / "val" / "n01" / "0.JPEG").resize((42, 28), Image.Resampling.BILINEAR)
    wanted = np.asarray(image.crop((9, 2, 33, 26))).transpose(2, 0, 1)
    np.testing.assert_array_equal(test.integers([0])[0], wanted)


def test_the_imagenet_card_reads_such_a_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "imagenet").symlink_to(photos / "photos")
    monkeypatch.setenv("CERTBENCH_DATA", str(photos))
    card = load_card("imagenet")
    with pytest.raises(BenchError, match="3 class folders, the card has 1000 classes"):
        load_split(card, "test")
    text = (Path(__file__).parents[2] / "datasets" / "imagenet.toml").read_text()
    (photos / "imagenet.toml").write_text(text.replace("classes = 1000", "classes = 3").replace("= 5000", "= 5"))
    train, test = load_splits(load_card(str(photos / "imagenet.toml")), "train", "test")
    assert (len(train), len(test)) == (13, 9)
    assert test.pixels([0, 8]).shape == (2, 3, 224, 224)


def test_only_accessed_pictures_are_decoded_and_nothing_large_is_kept(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "KEEP_BYTES", 1000)
    card = load_card(str(photos / "photos.toml"))
    test = load_split(card, "test")
    for name in ("n02", "n10"):  # refused when decoded
        for file in (photos / "photos" / "val" / name).iterdir():
            file.write_bytes(b"no picture")
    one = test.pixels([0])
    tracemalloc.start()
    for _ in range(20):
        np.testing.assert_array_equal(test.pixels([0]), one)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    test.sha256()
    with pytest.raises(BenchError, match="not a readable picture"):
        test.pixels([3])


def test_a_changed_file_changes_the_hash_without_being_decoded(photos: Path) -> None:
    card = load_card(str(photos / "photos.toml"))
    before = load_split(card, "test").sha256()
    assert load_split(card, "test").sha256() == before
    file = photos / "photos" / "val" / "n02" / "1.JPEG"
    os.utime(file, ns=(0, 0))
    assert load_split(card, "test").sha256() != before
    file.unlink()
    split = load_split(card, "test")
    (photos / "photos" / "val" / "n02" / "0.JPEG").unlink()
    with pytest.raises(BenchError, match="No such file"):
        split.sha256()
    with pytest.raises(BenchError, match="not a file"):
        split.pixels(slice(None))


def test_folders_that_do_not_match_the_card_are_refused(photos: Path) -> None:
    def line() -> str:
        with pytest.raises(BenchError) as e:
            load_split(load_card(str(photos / "photos.toml")), "test").pixels(slice(None))
        assert "\n" not in str(e.value)
        return str(e.value)

    root = photos / "photos"
    os.mkfifo(root / "val" / "n01" / "pipe.png")  # opening it would block
    assert "pipe.png: not a file" in line()
    (root / "val" / "n01" / "pipe.png").unlink()
    shutil.move(root / "val" / "n10", root / "val" / "n11")
    assert "3 class folders, the card has 3 classes; not in the card: 'n11'; missing: 'n10'" in line()
    shutil.rmtree(root / "val" / "n11")
    (root / "val" / "n10").mkdir()
    assert "n10: no pictures in this class folder" in line()
    shutil.rmtree(root / "val")
    assert "no folder of pictures at" in line()
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    assert "make a folder of pictures for each class" in line()
    (photos / "photos.toml").write_text(PHOTOS.replace('test = "val"', 'test = "../../etc"'))
    assert "must be a path below the data folder" in line()


@pytest.mark.skipif(sys.platform != "linux", reason="a file system whose names are any bytes")
def test_names_that_are_not_utf8(photos: Path) -> None:
    for name in sorted((photos / "photos").glob("*/n01/*")):
        os.rename(name, os.fsencode(name.parent) + b"/\xff" + os.fsencode(name.name))
    split = load_split(load_card(str(photos / "photos.toml")), "test")
    assert len(split.sha256()) == 64
    assert split.images[[0]].shape == (1, 3, 24, 24)
