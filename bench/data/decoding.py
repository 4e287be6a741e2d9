"""Decode a picture to 8-bit pixels. A loss of information is refused; conversions are reported."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError, one_line

# Formats Pillow may try. Others run programs (EPS runs Ghostscript), or are silently cut to 8 bits (AVIF, JPEG 2000).
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".gif"}
)
HEADER = 1024  # first bytes of a file, enough for ``_largest``
ORIENTATION = 0x0112  # the EXIF tag
_EXIF = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # keys of Pillow's info that may contain the tag
_AS_STORED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # modes that are converted to RGB without changing colours


@dataclass(frozen=True)
class Decoded:
    """Pixels [C, H, W] of 8 bits, the picture's name in messages, and a description of each conversion.

    ``stored``: height and width as stored, before a crop or resizing.
    """

    pixels: NDArray[np.uint8]
    where: str
    changes: tuple[str, ...]
    stored: tuple[int, int]


# Width and height of a picture to a box in it: left, top, width, height.
Crop = Callable[[int, int], tuple[int, int, int, int]]


def decode(
    data: Path | memoryview,
    where: str,
    shape: tuple[int, int, int],
    resize: int,
    crop: Crop | None = None,
    lossless: bool = False,
    fix: str = "set resize in its [source]",
) -> Decoded:
    """Decode one picture.

    Args:
        data: A file, or its bytes.
        where: Name of the picture in messages.
        shape: Channels, height and width. Grey pictures are allowed for 1 and 3 channels, colour ones for 3.
        resize: Scale the shorter side to this (bilinear, antialiased) and crop the centre, as ImageNet's evaluation
            does; 0: the picture must have the shape.
        crop: Cut this box out of the picture as stored, and scale it to the shape, in place of ``resize``.
        lossless: The data set's own pictures are lossless, so a lossy one is a copy with other pixels: a change.
        fix: What the message about another shape advises.

    Raises:
        BenchError: The picture is unreadable, has another shape, or more than 8 bits.
    """
    from PIL import Image

    channels, height, width = shape
    try:
        if isinstance(data, Path) and not data.is_file():
            raise BenchError(f"{where}: not a file")
        with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as stream, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            header = stream.read(HEADER)
            stream.seek(0)
            with Image.open(stream, formats=FORMATS) as image:
                largest = 0 if image.mode[0] in "IF" else _largest(image, header)
                _refuse(image, largest, where, channels)
                changes = _unusual(image, largest) + _copied(image, header, lossless)
                if image.has_transparency_data:
                    seen = image.convert("RGBA")  # first, since Pillow warns of palettes converted straight to RGB
                    if seen.getchannel("A").getextrema() != (255, 255):
                        changes.append("transparency dropped")
                    picture = seen.convert("RGB") if channels == 3 else image.convert("L")
                else:
                    picture = image.convert("RGB" if channels == 3 else "L")
                if _EXIF & image.info.keys() and image.format != "TIFF" and _turned(image):
                    changes.append("orientation tag not applied")
    except BenchError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BenchError(
            f"{where}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb"
        ) from None
    except Exception as e:  # Pillow's decoders raise errors of any type
        raise BenchError(f"{where}: not a readable picture: {one_line(e)}; replace or delete it") from None
    stored = picture.size[::-1]
    if crop is not None and (resize or picture.size == (width, height)):
        left, top, w, h = crop(*picture.size)
        picture = picture.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BILINEAR)
    elif resize:
        if min(picture.size) < resize:
            changes.append("smaller than the card's resize, enlarged")
        picture = _resized(picture, where, height, width, resize)
    if picture.size != (width, height):
        w, h = picture.size
        raise BenchError(f"{where}: {h}x{w} pixels, but the card's shape is {height}x{width}; {fix}")
    array = np.asarray(picture, np.uint8)
    pixels = array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
    return Decoded(pixels, where, tuple(changes), stored)


def _refuse(image: Any, largest: int, where: str, channels: int) -> None:
    """Raise BenchError for a picture of more than 8 bits, of signed samples, or of colours for one channel.

    ``largest`` is 0 where Pillow's mode already has more bits.
    """
    if not 0 < largest < 256:
        bits = f" of {largest.bit_length()} bits a channel" if largest else ""
        raise BenchError(
            f"{where}: mode {image.mode}{bits}, but the card's {channels} channels need 8 bits a channel; "
            f"convert the pictures to 8 bits first"
        )
    if image.format == "TIFF":
        if set(image.tag_v2.get(339, (1,))) - {1}:  # SampleFormat; Pillow reads signed bytes as unsigned
            raise BenchError(f"{where}: its samples are not unsigned integers; convert the pictures first")
        # Pillow uses the upper byte of each 16-bit entry of ColorMap. Writers store a byte v as v*257 or v*256.
        if image.mode in ("P", "PA") and any(v % 256 and v % 257 for v in image.tag_v2.get(320, ())):
            raise BenchError(f"{where}: its palette has 16 bits a colour, not 8; convert the pictures to 8 bits first")
    if channels == 1 and image.mode not in ("1", "L"):
        raise BenchError(
            f"{where}: mode {image.mode}, but the card's 1 channel needs grey; set 3 channels in its shape"
        )


def _largest(image: Any, header: bytes) -> int:
    """Return the largest possible value of a stored sample, from the file's header; palettes have 8-bit colours.

    Pillow's mode does not suffice: it is RGB for 16 bits a channel too, with the lower byte lost.
    """
    bits = 8
    if image.format == "PNG":
        if header[12:16] != b"IHDR":
            raise ValueError("a PNG file must begin with IHDR")
        bits = header[24] if header[25] != 3 else 8
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (1,))) if image.mode not in ("P", "PA") else 8
    elif image.format == "PPM":
        words = re.sub(rb"#[^\r\n]*", b"", header).split(None, 4)
        return 1 if words[0] in (b"P1", b"P4") else int(words[3])
    elif image.format == "BMP" and image.mode == "RGB":
        at = 24 if header[14] == 12 else 28  # for the two versions of the header
        bits = 5 if int.from_bytes(header[at : at + 2], "little") == 16 else 8  # 5 or 6 bits a channel
    elif image.mode == "1":
        bits = 1
    return (1 << bits) - 1


def _copied(image: Any, header: bytes, lossless: bool) -> list[str]:
    """Describe a file that only approximates a picture of a lossless data set."""
    lossy = (
        image.format in ("JPEG", "MPO")
        or (image.format == "WEBP" and b"VP8 " in header[12:])
        or (image.format == "TIFF" and image.info.get("compression") == "jpeg")
    )
    copy = f"a {image.format} copy, whose pixels differ from those of the data set's own pictures"
    return [copy] if lossless and lossy else []


def _unusual(image: Any, largest: int) -> list[str]:
    """Describe what a conversion to 8-bit RGB or grey changes or drops, except transparency."""
    changes = []
    if largest < 255:
        changes.append(f"values 0 to {largest} scaled to 0 to 255")
    if getattr(image, "is_animated", False):
        changes.append("only the first of several frames used")
    if image.format == "TIFF":
        if image.tag_v2.get(277, 1) > len(image.getbands()):
            changes.append("channels beyond the colours dropped")
        if image.tag_v2.get(ORIENTATION, 1) != 1:
            changes.append("rotated by its orientation tag")  # by Pillow, for this format alone
    if image.mode not in _AS_STORED:
        changes.append(f"{image.mode} converted to RGB without a colour profile")
    return changes


def _turned(image: Any) -> bool:
    """Return whether an orientation tag asks to rotate or mirror the picture; False for a damaged tag."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(ORIENTATION, 1)) in range(2, 9)
    except Exception:  # Pillow's parser raises errors of any type on untrusted bytes
        return False


def _resized(picture: Any, where: str, height: int, width: int, resize: int) -> Any:
    from PIL import Image

    w, h = picture.size
    short = min(w, h)
    if resize * resize * max(w, h) // short > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise BenchError(f"{where}: {h}x{w} pixels are too elongated to resize; crop or delete the picture")
    picture = picture.resize((resize * w // short, resize * h // short), Image.Resampling.BILINEAR)
    w, h = picture.size
    left, top = round((w - width) / 2), round((h - height) / 2)
    return picture.crop((left, top, left + width, top + height))
