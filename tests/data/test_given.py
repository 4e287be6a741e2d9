"""Pictures given for a prediction: on the card's shape and grid as they are, else fitted as told, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from PIL import Image

from bench.data.card import Card
from bench.data.datasets import load_card
from bench.data.given import picture_files, read_array, read_picture
from bench.errors import BenchError

CARD = """
name = "card"
shape = [{channels}, {side}, {side}]
levels = {levels}
classes = 2
source = {{ reader = "folder", folder = ".", resize = {resize}, lossless = {lossless} }}
"""


def colours(tmp_path: Path, side: int = 8, resize: int = 0, lossless: bool = True) -> Card:
    file = tmp_path / "card.toml"
    text = CARD.format(channels=3, side=side, levels=256, resize=resize, lossless=str(lossless).lower())
    file.write_text(text)
    return load_card(str(file))


def saved(tmp_path: Path, values: Any, name: str = "x.png", **how: Any) -> Path:
    Image.fromarray(np.asarray(values, np.uint8)).save(tmp_path / name, **how)
    return tmp_path / name


@pytest.fixture
def rgb() -> Any:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3))


def test_an_8_bit_picture_of_a_card_of_256_levels_is_taken_as_it_is(tmp_path: Path, rgb: Any) -> None:
    found = read_picture(colours(tmp_path), saved(tmp_path, rgb))
    assert np.array_equal(found.integers, rgb.transpose(2, 0, 1)) and not found.changes and not found.fitted


@given(levels=strategies.integers(2, 256))
def test_every_level_is_stored_in_8_bits_and_read_back(levels: int) -> None:
    from bench.data.given import _to_levels

    k = np.arange(levels)
    stored = np.rint(k * (255 / (levels - 1))).astype(np.uint8)
    assert len(set(stored.tolist())) == levels
    read, off = _to_levels(stored, levels)
    assert np.array_equal(read, k) and not off
    every, off = _to_levels(np.arange(256, dtype=np.uint8), levels)
    furthest = np.abs(every / (levels - 1) - np.arange(256) / 255).max()
    assert off == 256 - levels and furthest <= 0.5 / (levels - 1) + 1e-9


def test_values_off_the_grid_are_refused_or_rounded_as_told(tmp_path: Path) -> None:
    digits = load_card("digits")
    values = np.zeros((8, 8))
    values[0, :3] = [16, 17, 255]  # level 1 is stored as 16
    file = saved(tmp_path, values)
    with pytest.raises(BenchError, match=r"x\.png: 1 values are not on the card's grid of 17 levels.*--fit levels"):
        read_picture(digits, file)
    found = read_picture(digits, file, "levels")
    assert found.integers[0, 0, :3].tolist() == [1, 1, 16]
    assert found.fitted == ("1 values rounded to the nearest of 17 levels",)
    values[0, 1] = 16
    assert read_picture(digits, saved(tmp_path, values), "levels").fitted == ()


def test_another_shape_is_refused_or_scaled_and_cropped_as_the_card_does(tmp_path: Path) -> None:
    card = colours(tmp_path, side=8, resize=10)
    values = np.random.default_rng(1).integers(0, 256, (20, 30, 3))
    file = saved(tmp_path, values)
    message = "20x30 pixels, but the card's shape is 8x8; --fit resize-crop scales and crops it, and the radius then"
    with pytest.raises(BenchError, match=message):
        read_picture(card, file)
    found = read_picture(card, file, "resize-crop")
    small = Image.fromarray(values.astype(np.uint8)).resize((15, 10), Image.Resampling.BILINEAR).crop((4, 1, 12, 9))
    assert np.array_equal(found.integers, np.asarray(small).transpose(2, 0, 1))
    assert found.fitted == ("shorter side scaled to 10 (bilinear), centre cropped to 8x8",)
    # A card without a rule of its own: the shorter side gets the card's size, which leaves its own pictures alone.
    plain = colours(tmp_path, resize=0)
    own = saved(tmp_path, values[:8, :8], "own.png")
    kept = read_picture(plain, own, "resize-crop")
    assert np.array_equal(kept.integers, read_picture(plain, own).integers) and kept.fitted == ()
    assert read_picture(plain, file, "resize-crop").fitted


def test_lossy_copies_and_other_conversions_are_reported(tmp_path: Path, rgb: Any) -> None:
    found = read_picture(colours(tmp_path), saved(tmp_path, rgb, "x.jpg"))
    assert found.changes == ("a JPEG copy, whose pixels differ from those of the data set's own pictures",)
    assert read_picture(colours(tmp_path, lossless=False), saved(tmp_path, rgb, "x.jpg")).changes == ()
    alpha = np.dstack([rgb, np.full((8, 8), 128)])
    assert read_picture(colours(tmp_path), saved(tmp_path, alpha, "a.png")).changes == ("transparency dropped",)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(BenchError, match="not a readable picture"):
        read_picture(colours(tmp_path), tmp_path / "broken.png")


def test_arrays_and_tensors_give_the_integers_of_the_file(tmp_path: Path, rgb: Any) -> None:
    card = colours(tmp_path)
    integers = rgb.transpose(2, 0, 1)
    for values in (
        integers,
        integers.astype(np.uint8),
        integers / 255,
        (integers / 255).astype(np.float32),
        torch.from_numpy(integers),
        torch.from_numpy(integers).float().div(255).requires_grad_(),
    ):
        assert np.array_equal(read_array(card, values, "x").integers, integers)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x.transpose(1, 2, 0), "shape (8, 8, 3), but the card's is (3, 8, 8): channels, height, width"),
        (lambda x: x + 256, "but the card's are 0 to 255"),
        (lambda x: x - 1.0 - x, "pixels from -1 to -1; give them in [0, 1], not normalised"),
        (lambda x: x * np.nan, "give them in [0, 1], not normalised"),
        (lambda x: np.full(x.shape, 0.5), "192 values are not on the card's grid k / 255; fit='levels' rounds them"),
        (lambda x: x > 3, "values of type bool"),
    ],
)
def test_arrays_of_another_shape_range_or_grid_are_refused(tmp_path: Path, rgb: Any, change: Any, problem: str) -> None:
    with pytest.raises(BenchError, match=re.escape(problem)):
        read_array(colours(tmp_path), change(rgb.transpose(2, 0, 1)), "x")


def test_an_array_off_the_grid_is_rounded_where_told(tmp_path: Path) -> None:
    found = read_array(colours(tmp_path), np.full((3, 8, 8), 0.5001), "x", "levels")
    assert (found.integers == 128).all() and found.fitted == ("192 values rounded to the nearest of 256 levels",)
    with pytest.raises(BenchError, match="resize-crop is for files"):
        read_array(colours(tmp_path), np.zeros((3, 8, 8)), "x", "resize-crop")


def test_folders_are_searched_for_pictures_and_other_files_counted(
    tmp_path: Path, rgb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d" / "inner").mkdir(parents=True)
    files = [saved(tmp_path / "d", rgb, "b.PNG", format="PNG"), saved(tmp_path / "d" / "inner", rgb, "a.png")]
    (tmp_path / "d" / "notes.txt").write_text("")
    assert picture_files([tmp_path / "d", files[0]]) == [*files, files[0]]
    assert "1 file left out, no picture by name" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for path, problem in ((tmp_path / "empty", "a folder without pictures"), (tmp_path / "no", "no picture or folder")):
        with pytest.raises(BenchError, match=problem):
            picture_files([path])
