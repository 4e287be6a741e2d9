"""Pictures of every kind: the stored values are returned, a change is reported, or the picture is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.data.datasets import load_card, load_split
from bench.data.split import Split
from bench.errors import BenchError
from tests.helpers import encoded

RNG = np.random.default_rng(1)
COLOURS = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
GREYS = COLOURS[..., :1]
DEEP = RNG.integers(0, 211, (8, 8, 4)).astype(np.uint16)  # a 12-bit camera's dark picture: the upper byte is 0
HALF = np.where(np.arange(64).reshape(8, 8, 1) < 32, 255, 7).astype(np.uint8)  # an alpha channel

CARD = """
name = "mine"
shape = [{channels}, 8, 8]
classes = 2
source = {{ reader = "{reader}", folder = "data", train = "train{suffix}", test = "train{suffix}"{more} }}
"""


def saved(values: Any, form: str, mode: str | None = None, **options: Any) -> bytes:
    """Return a file written by Pillow."""
    image = Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, form, **options)
    return out.getvalue()


@pytest.fixture(params=["folder", "parquet"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Split]:
    """Store a picture in two classes, in a folder or a Parquet file, and load it as the test split."""

    def load(data: bytes, channels: int = 3, more: str = "") -> Split:
        root = tmp_path / "data"
        suffix = ".parquet" if request.param == "parquet" else ""
        if request.param == "parquet":
            root.mkdir()
            pq.write_table(pa.table({"image": [data, data], "label": [0, 1]}), root / "train.parquet")
        else:
            for name in ("a", "b"):
                (root / "train" / name).mkdir(parents=True)
                (root / "train" / name / "x.png").write_bytes(data)
        text = CARD.format(channels=channels, reader=request.param, suffix=suffix, more=more)
        (tmp_path / "mine.toml").write_text(text)
        return load_split(load_card(str(tmp_path / "mine.toml")), "test")

    return load


PALETTE = saved(COLOURS, "PNG", "P")
_grey = np.repeat(GREYS, 3, 2)
_small = GREYS // 64 * 85  # four greys
_cmyk = np.dstack([255 - COLOURS, np.zeros_like(GREYS)])  # no black: RGB is 255 less each
_animated: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}
_exif = Image.Exif()
_exif[0x0112] = 6  # rotate by 90 degrees
_DROPPED, _FIRST, _TAG = "transparency dropped", "only the first of several frames used", "orientation tag not applied"
_EXTRA = "channels beyond the colours dropped"

# A file, its pixels [8, 8, 3] (None: not compared), and what must be reported ("": nothing)
KINDS: dict[str, tuple[bytes, Any, str]] = {
    "PNG": (saved(COLOURS, "PNG"), COLOURS, ""),
    "interlaced PNG": (encoded.png(COLOURS, encoded.RGB, interlaced=True), COLOURS, ""),
    "TIFF": (encoded.tiff(COLOURS, 2), COLOURS, ""),
    "compressed TIFF": (saved(COLOURS, "TIFF", compression="tiff_lzw"), COLOURS, ""),
    "BMP": (saved(COLOURS, "BMP"), COLOURS, ""),
    "PPM": (encoded.pnm("P6", 255, COLOURS), COLOURS, ""),
    "lossless WebP": (saved(COLOURS, "WEBP", lossless=True), COLOURS, ""),
    "grey PNG": (saved(GREYS, "PNG"), _grey, ""),
    "grey TIFF": (encoded.tiff(GREYS, 1), _grey, ""),
    "grey GIF": (saved(GREYS, "GIF"), _grey, ""),
    "palette PNG": (PALETTE, np.asarray(Image.open(io.BytesIO(PALETTE)).convert("RGB")), ""),
    "opaque RGBA PNG": (saved(np.dstack([COLOURS, np.full_like(HALF, 255)]), "PNG"), COLOURS, ""),
    "RGBA PNG": (saved(np.dstack([COLOURS, HALF]), "PNG"), COLOURS, _DROPPED),
    "RGBA TIFF": (encoded.tiff(np.dstack([COLOURS, HALF]), 2, t338=2), COLOURS, _DROPPED),
    "RGBA WebP": (saved(np.dstack([COLOURS, HALF]), "WEBP", lossless=True, exact=True), COLOURS, _DROPPED),
    "grey PNG with alpha": (encoded.png(np.dstack([GREYS, HALF]), encoded.GREY_ALPHA), _grey, _DROPPED),
    "palette PNG with alpha": (saved(_small, "PNG", "P", transparency=bytes([0, 9, 99]) + bytes(200)), None, _DROPPED),
    "PNG with a transparent colour": (
        encoded.png(COLOURS, encoded.RGB, tRNS=COLOURS[0, 0].astype(">u2").tobytes()),
        COLOURS,
        _DROPPED,
    ),
    "1-bit PNG": (encoded.png(GREYS // 128, encoded.GREY, 1), _grey // 128 * 255, "values 0 to 1 scaled"),
    "2-bit PNG": (encoded.png(GREYS // 64, encoded.GREY, 2), _grey // 64 * 85, "values 0 to 3 scaled"),
    "4-bit PNG": (encoded.png(GREYS // 16, encoded.GREY, 4), _grey // 16 * 17, "values 0 to 15 scaled"),
    "1-bit TIFF": (saved(GREYS // 128 * 255, "TIFF", "1"), _grey // 128 * 255, "values 0 to 1 scaled"),
    "1-bit PBM": (saved(GREYS // 128 * 255, "PPM", "1"), _grey // 128 * 255, "values 0 to 1 scaled"),
    "PPM of 16 levels": (encoded.pnm("P6", 15, COLOURS // 16), COLOURS // 16 * 17, "values 0 to 15 scaled"),
    "16-bit BMP": (encoded.bmp(COLOURS.astype(int) // 8), COLOURS // 8 * (255 / 31), "values 0 to 31 scaled"),
    "CMYK TIFF": (encoded.tiff(_cmyk, 5), COLOURS, "CMYK converted to RGB without a colour profile"),
    "CMYK JPEG": (saved(COLOURS, "JPEG", "CMYK"), None, "CMYK converted to RGB without a colour profile"),
    "YCbCr TIFF": (saved(COLOURS, "TIFF", "YCbCr"), None, "YCbCr converted to RGB"),
    "animated GIF": (saved(_small, "GIF", **_animated), np.repeat(_small, 3, 2), _FIRST),
    "animated PNG": (saved(COLOURS, "PNG", **_animated), COLOURS, _FIRST),
    "animated WebP": (saved(COLOURS, "WEBP", lossless=True, **_animated), COLOURS, _FIRST),
    "TIFF of two pages": (saved(COLOURS, "TIFF", **_animated), COLOURS, _FIRST),
    "MPO, a camera's JPEG with a preview": (saved(COLOURS, "MPO", **_animated), None, _FIRST),
    "TIFF with a fourth band": (encoded.tiff(np.dstack([COLOURS, HALF]), 2, t338=0), COLOURS, _EXTRA),
    "turned JPEG": (saved(_grey, "JPEG", quality=100, exif=_exif), None, _TAG),
    "turned PNG": (saved(COLOURS, "PNG", exif=_exif), COLOURS, _TAG),
    "turned WebP": (saved(COLOURS, "WEBP", lossless=True, exif=_exif), COLOURS, _TAG),
    "turned TIFF": (encoded.tiff(COLOURS, 2, t274=3), COLOURS[::-1, ::-1], "rotated by its orientation tag"),
    "palette TIFF": (encoded.tiff(_small, 3, t320=[i * 257 for i in range(256)] * 3), np.repeat(_small, 3, 2), ""),
}
if int(PIL.__version__.partition(".")[0]) < 13:
    del KINDS["YCbCr TIFF"]  # seen to be refused as cut short by Pillow 10.4 to 12.1


@pytest.mark.parametrize("kind", KINDS)
def test_stored_values_come_back_and_changes_are_reported(
    kind: str, read: Callable[..., Split], capsys: pytest.CaptureFixture[str]
) -> None:
    data, wanted, change = KINDS[kind]
    split = read(data)
    assert split.origin.endswith(("data", "data/train"))
    pixels = split.integers([0, 1, 0]).transpose(0, 2, 3, 1)
    if wanted is not None:
        np.testing.assert_allclose(pixels[0], wanted, atol=1 if kind == "16-bit BMP" else 0)
    np.testing.assert_array_equal(pixels[0], pixels[1])
    said = capsys.readouterr().err
    if not change:
        assert said == ""
        assert split.origin.endswith(("data", "data/train"))
    else:
        assert said.count("\n") == 1 and change in said  # once, for two such pictures
        assert f"2 of its pictures: {change}" in split.origin
        assert f"1 of its pictures: {change}" in split.select([1]).origin


LOSSY = {
    "JPEG": saved(COLOURS, "JPEG"),
    "MPO": saved(COLOURS, "MPO", **_animated),
    "WebP": saved(COLOURS, "WEBP"),
    "WebP with a tag": saved(COLOURS, "WEBP", exif=_exif),
    "TIFF": saved(COLOURS, "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_copy_of_a_lossless_data_set_is_reported(
    kind: str, read: Callable[..., Split], capsys: pytest.CaptureFixture[str]
) -> None:
    split = read(LOSSY[kind], more=", lossless = true")
    split.integers([0, 1])
    assert f"2 of its pictures: a {kind.upper()[:4]} copy, whose pixels differ" in split.origin
    assert capsys.readouterr().err.count("copy, whose pixels differ") == 1


@pytest.mark.parametrize("kind", ["PNG", "WebP", "TIFF", "BMP"])
def test_lossless_pictures_are_read_without_a_remark(kind: str, read: Callable[..., Split]) -> None:
    options = {"lossless": True} if kind == "WebP" else {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    split = read(saved(COLOURS, kind.upper(), **options), more=", lossless = true")
    np.testing.assert_array_equal(split.integers([0])[0].transpose(1, 2, 0), COLOURS)
    assert split.origin.endswith(("data", "data/train"))


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_picture_of_another_data_set_is_no_copy(kind: str, read: Callable[..., Split]) -> None:
    split = read(LOSSY[kind])
    split.integers([0])
    assert "copy" not in split.origin


REFUSED: dict[str, tuple[bytes, str]] = {
    "PNG": (encoded.png(DEEP[..., :3], encoded.RGB, 16), "mode RGB of 16 bits a channel"),
    "interlaced PNG": (encoded.png(DEEP[..., :3], encoded.RGB, 16, interlaced=True), "of 16 bits a channel"),
    "RGBA PNG": (encoded.png(DEEP, encoded.RGBA, 16), "of 16 bits a channel"),
    "grey PNG": (encoded.png(DEEP[..., :1], encoded.GREY, 16), "mode I;16"),
    "grey PNG with alpha": (encoded.png(DEEP[..., :2], encoded.GREY_ALPHA, 16), "of 16 bits a channel"),
    "TIFF": (encoded.tiff(DEEP[..., :3], 2), "mode RGB of 16 bits a channel"),
    "RGBA TIFF": (encoded.tiff(DEEP, 2, t338=2), "of 16 bits a channel"),
    "CMYK TIFF": (encoded.tiff(DEEP, 5), "mode CMYK of 16 bits a channel"),
    "grey TIFF": (encoded.tiff(DEEP[..., :1], 1), "mode I;16"),
    "float TIFF": (saved(GREYS.astype(np.float32), "TIFF"), "mode F"),
    "32-bit TIFF": (saved(GREYS.astype(np.int32), "TIFF"), "mode I"),
    "signed TIFF": (encoded.tiff(GREYS, 1, t339=2), "not unsigned integers"),
    "TIFF palette": (encoded.tiff(GREYS, 3, t320=[i * 200 for i in range(256)] * 3), "palette has 16 bits a colour"),
    "PPM": (encoded.pnm("P6", 65535, DEEP[..., :3]), "mode RGB of 16 bits a channel"),
    "PPM of 10 bits": (encoded.pnm("P6", 1023, DEEP[..., :3]), "of 10 bits a channel"),
    "PGM": (encoded.pnm("P5", 65535, DEEP[..., :1]), "mode I"),
    "PGM of 12 bits": (encoded.pnm("P5", 4095, DEEP[..., :1]), "mode I"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", REFUSED)
def test_more_than_8_bits_are_refused(kind: str, channels: int, read: Callable[..., Split]) -> None:
    data, message = REFUSED[kind]
    split = read(data, channels)
    with pytest.raises(BenchError) as e:
        split.integers([0])
    assert message in str(e.value)
    assert "convert the pictures" in str(e.value)
    assert "\n" not in str(e.value)


def test_one_channel_keeps_grey_and_reports_what_it_drops(
    read: Callable[..., Split], capsys: pytest.CaptureFixture[str]
) -> None:
    data = encoded.png(GREYS, encoded.GREY, tRNS=GREYS[0, 0].astype(">u2").tobytes())
    np.testing.assert_array_equal(read(data, 1).integers([0])[0, 0], GREYS[..., 0])
    assert "transparency dropped" in capsys.readouterr().err


def test_enlarging_is_reported(read: Callable[..., Split], capsys: pytest.CaptureFixture[str]) -> None:
    split = read(saved(COLOURS[:6, :7], "PNG"), 3, ", resize = 8")
    assert split.integers([0]).shape == (1, 3, 8, 8)
    assert "smaller than the card's resize, enlarged" in capsys.readouterr().err


def test_a_damaged_orientation_tag_is_ignored(read: Callable[..., Split], capsys: pytest.CaptureFixture[str]) -> None:
    split = read(encoded.png(COLOURS, encoded.RGB, eXIf=b"II*\0\xff\xff\xff\xff" + bytes(9)))
    np.testing.assert_array_equal(split.integers([0])[0].transpose(1, 2, 0), COLOURS)
    assert capsys.readouterr().err == ""
