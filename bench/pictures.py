"""Encoded pictures, decoded when they are asked for."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError, one_line

# The formats Pillow may try: among its others are ones that run programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
KEEP_BYTES = 1 << 30  # a part that fits is kept once decoded (CIFAR-10: 0.2 GB); a larger one is decoded each time


@dataclass(frozen=True)
class Pictures:
    """Pictures [N, C, H, W] of 8 bits, indexed like an array: ``pictures[indices]`` decodes those rows only.

    ``row``s are the source's own numbers, ``kept`` and ``done`` are shared by all selections of a source.
    """

    rows: NDArray[np.int64]
    shape: tuple[int, int, int]
    picture: Callable[[int], NDArray[np.uint8]]
    stamp: Callable[[int], bytes | memoryview]
    resize: int
    kept: NDArray[np.uint8] | None
    done: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        count: int,
        shape: tuple[int, int, int],
        picture: Callable[[int], NDArray[np.uint8]],
        stamp: Callable[[int], bytes | memoryview],
        resize: int,
    ) -> Pictures:
        """All ``count`` pictures of a source: ``picture(row)`` decodes one, ``stamp(row)`` tells it from any other."""
        # Memory that is never written is never taken, so a first thousand of many costs a thousand.
        kept = np.empty((count, *shape), np.uint8) if count * math.prod(shape) <= KEEP_BYTES else None
        return cls(np.arange(count), shape, picture, stamp, resize, kept, np.zeros(count, np.bool_))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> NDArray[np.uint8]:
        rows = self.rows[indices]
        if self.kept is None:
            decoded = np.empty((len(rows), *self.shape), np.uint8)
            for at, row in enumerate(rows.tolist()):
                decoded[at] = self.picture(row)
            return decoded
        for row in rows[~self.done[rows]].tolist():
            self.kept[row] = self.picture(row)
            self.done[row] = True
        found: NDArray[np.uint8] = self.kept[rows]
        return found

    def select(self, indices: Any) -> Pictures:
        """Those of the given rows, still encoded."""
        return replace(self, rows=self.rows[indices])

    def fingerprint(self) -> bytes:
        """What decides these pictures, with nothing decoded: each one's stamp and how it is cut to shape.

        The stamp of a picture in a parquet file is its encoded bytes; that of a file is its path, size
        and time of change. The same pixels stored otherwise have another fingerprint, so weights trained
        on them are trained again, never wrongly taken from the cache.
        """
        h = hashlib.sha256(f"{self.shape}|{self.resize}".encode())
        for row in self.rows.tolist():
            stamp = self.stamp(row)
            h.update(len(stamp).to_bytes(8, "little"))
            h.update(stamp)
        return h.digest()


def decode(data: Path | memoryview, where: str, shape: tuple[int, int, int], resize: int) -> NDArray[np.uint8]:
    """One picture as integers 0 .. 255, [C, H, W]. Raises BenchError naming ``where`` when it is not of the shape.

    With ``resize`` the shorter side is scaled to it (bilinear, antialiased) and the centre of ``shape``
    cut out, as ImageNet's evaluation does. Three channels take any picture of 8 bits (grey is repeated,
    transparency dropped), one channel grey pictures only. The camera's orientation tag is ignored, as
    torchvision does.
    """
    from PIL import Image

    channels, height, width = shape
    try:
        if isinstance(data, Path) and not data.is_file():
            raise BenchError(f"{where}: not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=FORMATS) as image:
                if image.mode not in ("1", "L") if channels == 1 else image.mode[0] in "IF":
                    wanted = "grey" if channels == 1 else "8 bits a channel"
                    raise BenchError(f"{where}: mode {image.mode}, but the card's {channels} channels need {wanted}")
                picture = image.convert("L" if channels == 1 else "RGB")
    except BenchError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BenchError(
            f"{where}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb"
        ) from None
    except Exception as e:  # Pillow's decoders raise whatever they stumble over
        raise BenchError(f"{where}: not a readable picture: {one_line(e)}") from None
    if resize:
        w, h = picture.size
        short = min(w, h)
        if resize * resize * max(w, h) // short > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise BenchError(f"{where}: {h}x{w} pixels are too elongated to resize")
        picture = picture.resize((resize * w // short, resize * h // short), Image.Resampling.BILINEAR)
        w, h = picture.size
        left, top = round((w - width) / 2), round((h - height) / 2)
        picture = picture.crop((left, top, left + width, top + height))
    if picture.size != (width, height):
        w, h = picture.size
        raise BenchError(
            f"{where}: {h}x{w} pixels, but the card's shape is {height}x{width}; set resize in its [source]"
        )
    array = np.asarray(picture, np.uint8)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
