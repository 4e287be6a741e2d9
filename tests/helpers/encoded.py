"""Picture files written byte by byte, of kinds that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # PNG's colour types
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(values: Any, colour: int, bits: int = 8, interlaced: bool = False, **chunks: bytes) -> bytes:
    """A PNG file of values [H, W, C]; ``chunks`` go before its data."""
    passes = [values[y::h, x::w] for x, y, w, h in _PASSES] if interlaced else [values]
    rows = b"".join(b"\0" + _packed(row.ravel(), bits) for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, interlaced)
    data = {"IHDR": header, **chunks, "IDAT": zlib.compress(rows), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name.encode(), content) for name, content in data.items())


def _packed(samples: Any, bits: int) -> bytes:
    if bits >= 8:
        return bytes(samples.astype(">u2" if bits == 16 else "u1").tobytes())
    digits = "".join(f"{int(v):0{bits}b}" for v in samples)
    return bytes(int(digits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(digits), 8))


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(values: Any, photometric: int, **tags: int | list[int]) -> bytes:
    """An uncompressed little-endian TIFF file of values [H, W, C] of 8 or 16 bits; ``tags`` as ``t339=2``."""
    height, width, channels = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    entries: dict[int, int | list[int]] = {256: width, 257: height, 258: [8 * values.dtype.itemsize] * channels}
    entries |= {259: 1, 262: photometric, 273: 8, 277: channels, 278: height, 279: len(data)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    more, ifd = b"", b""
    after = 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag in sorted(entries):
        value = entries[tag]
        numbers = value if isinstance(value, list) else [value]
        content = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(content) > 4:
            content, more = struct.pack("<I", after + len(more)), more + content
        ifd += struct.pack("<HHI", tag, 3, len(numbers)) + content.ljust(4, b"\0")
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(entries)) + ifd + bytes(4) + more
    )


def bmp(values: Any) -> bytes:
    """A BMP file of 5 bits a channel, values [H, W, 3] from 0 to 31; the width must be even."""
    packed = (values[::-1, :, 0] << 10 | values[::-1, :, 1] << 5 | values[::-1, :, 2]).astype("<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, values.shape[1], values.shape[0], 1, 16, 0, len(packed), 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + len(packed), 0, 0, 54) + head + packed


def pnm(kind: str, largest: int, values: Any) -> bytes:
    """A PPM (P6) or PGM (P5) file with a comment in its header."""
    head = f"{kind}\n# made up\n{values.shape[1]} {values.shape[0]}\n{largest}\n"
    return head.encode() + bytes(np.asarray(values).astype(">u2" if largest > 255 else "u1").tobytes())
