"""Fuzz pictures and weights: parquet files, folders, encoded pictures, safetensors and their configs."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench.data.datasets import load_card, load_split
from bench.models.names import blueprint, choose_base
from tests.fuzz.judging import changed, cut, cuts, dumped, edits, judge, scratch

# Pictures --------------------------------------------------------------------------------------------

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["L", "P", "RGB"],
    "WEBP": ["RGB", "RGBA"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "TIFF": ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"],
}
KINDS = [(form, mode) for form, modes in MODES.items() for mode in modes]


@functools.cache
def _encoded(form: str, mode: str, size: tuple[int, int]) -> bytes:
    values = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    out = io.BytesIO()
    Image.fromarray(values).convert("L" if mode == "I;16" else mode).convert(mode).save(out, form)
    return out.getvalue()


pictures = st.builds(
    lambda kind, size, torn: cut(_encoded(*kind, size), torn),
    st.sampled_from(KINDS),
    st.sampled_from([(8, 8), (8, 8), (8, 8), (1, 1), (30, 20), (1, 300)]),
    cuts,
) | st.binary(max_size=60)

CARD = """
name = "mine"
shape = [{channels}, 8, 8]
classes = 3
splits = {{ test = 1, validation = 1 }}
[source]
folder = "."
train = "train{suffix}"
resize = {resize}
reader = "{reader}"
"""


def _read_all(folder: Path) -> None:
    """Load the train split as a run does, and decode each picture."""
    split = load_split(load_card(str(folder / "card.toml")), "train")
    assert len(split.sha256()) == 64
    pixels = split.images[np.arange(len(split))]
    assert pixels.dtype == np.uint8 and pixels.shape[2:] == (8, 8) and len(pixels) == len(split) > 0
    assert split.labels.min() >= 0 and split.labels.max() < 3


def _card(folder: Path, reader: str, channels: int, resize: int) -> None:
    suffix = ".parquet" if reader == "parquet" else ""
    text = CARD.format(channels=channels, resize=resize, reader=reader, suffix=suffix)
    (folder / "card.toml").write_text(text)


looks = st.tuples(st.sampled_from([3, 3, 3, 1]), st.sampled_from([0, 9, 9, 10**6]))  # channels, resize
_NAMES = [
    b"a.png",
    b"b.png",
    "é.png".encode(),
    b"\xff\xe9.jpg",
    b"c\n\x1b[2J.PNG",
    b".hidden.png",
    b"notes.txt",
    b"d.gif",
]


@given(st.lists(st.tuples(st.sampled_from(_NAMES), pictures), min_size=1, max_size=6), looks)
def picture_folders(files: list[tuple[bytes, bytes]], look: tuple[int, int]) -> None:
    """Read damaged pictures, under file names that may not be valid text, in a folder for each class."""
    with scratch() as folder:
        for number, (name, data) in enumerate([*files, *(((b"z.png"), _encoded("PNG", "L", (8, 8))),) * 3]):
            place = folder / "train" / ("cat", "dog", "\udcff")[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / os.fsdecode(name)).write_bytes(data)
        _card(folder, "folder", *look)
        judge("picture folder", lambda: _read_all(folder))


# Parquet ---------------------------------------------------------------------------------------------

_BINARY = [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.binary(1)]
_BINARY += [pa.dictionary(pa.int8(), pa.binary()), pa.struct({"path": pa.binary()}), pa.list_(pa.binary()), pa.int8()]
_LABELS = [pa.int64(), pa.int8(), pa.uint64(), pa.float32(), pa.string(), pa.dictionary(pa.int8(), pa.int64())]
_LABELS += [pa.bool_(), pa.timestamp("ns"), pa.null()]
_labels = st.sampled_from([0, 1, 2] * 20 + [None, 3, -1, 2**63 - 1])
_plain = [k for k, (_, mode) in enumerate(KINDS) if mode not in ("I;16", "F")]
_rows = st.lists(st.tuples(st.sampled_from([*_plain * 4, *range(len(KINDS)), None]), _labels), min_size=1, max_size=8)


def _columns(images: list[bytes | None], labels: list[int | None], kind: Any, label_kind: Any) -> Any:
    pictured: list[Any] = list(images)
    if pa.types.is_struct(kind):
        pictured = [{"bytes": i, "path": "/etc/passwd"} if kind.names[0] == "bytes" else {"path": i} for i in images]
    elif pa.types.is_list(kind):
        pictured = [[i] for i in images]
    elif pa.types.is_integer(kind):
        pictured = [1] * len(images)
    elif pa.types.is_fixed_size_binary(kind):
        pictured = [b"x"] * len(images)
    numbers: list[Any] = list(labels)
    if pa.types.is_uint64(label_kind):
        numbers = [None if n is None else n % 2**64 for n in labels]
    elif pa.types.is_string(label_kind):
        numbers = [str(n) for n in labels]
    elif pa.types.is_null(label_kind):
        numbers = [None] * len(labels)
    elif pa.types.is_boolean(label_kind):
        numbers = [None if n is None else n > 0 for n in labels]
    elif not pa.types.is_int64(label_kind):
        numbers = [None if n is None else min(max(n, 0), 1) for n in labels]
    return pa.table({"image": pa.array(pictured, kind), "label": pa.array(numbers, label_kind)})


@given(
    _rows,
    st.sampled_from(_BINARY[:3] * 4 + _BINARY),
    st.sampled_from(_LABELS[:3] * 4 + _LABELS),
    st.sampled_from(["none", "snappy", "zstd", "gzip", "lz4", "brotli"]),
    st.booleans(),
    cuts,
    looks,
)
def parquets(
    rows: list[Any], kind: Any, label_kind: Any, packed: str, old: bool, torn: list[Any], look: tuple[int, int]
) -> None:
    """Read a damaged parquet file with columns of many kinds."""
    images = [None if k is None else _encoded(*KINDS[k], (8, 8)) for k, _ in rows]
    images += [_encoded("PNG", "L", (8, 8))] * 3
    table = _columns(images, [label for _, label in rows] + [0, 1, 2], kind, label_kind)
    out = io.BytesIO()
    pq.write_table(table, out, compression=packed, data_page_version="1.0" if old else "2.0", row_group_size=5)
    with scratch() as folder:
        (folder / "train.parquet").write_bytes(cut(out.getvalue(), torn))
        _card(folder, "parquet", *look)
        judge("parquet", lambda: _read_all(folder))


# Weights ---------------------------------------------------------------------------------------------

_ARGS: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 4, "depth": 1, "num_heads": 1, "in_chans": 1}
_CONFIG = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": _ARGS}
_CONFIG["pretrained_cfg"] = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "num_classes": 10}


@functools.cache
def _tensors() -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file of the model in ``_CONFIG``."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **_ARGS)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, value in model.state_dict().items():
        raw = value.numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


_DTYPES = ["F64", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F4", "C64", "I64", "U64", "BOOL", "F32", "x"]
_shapes = st.sampled_from([[0, 2**40, 2**40], [1] * 100, [], [4], [2**63], [-1]])
_new = st.sampled_from(_DTYPES) | _shapes | st.sampled_from([[0, 0], [0, 4], [0, 2**63], [4, 0]])
_no: list[tuple[int, str, Any]] = []
_header_edits = st.just(_no) | edits | st.lists(st.tuples(st.integers(0, 2**16), st.just("replace"), _new), max_size=2)


def modest(value: Any) -> bool:
    """Return whether all sizes in a config are small; large models are slow but not refused (docs/security.md)."""
    if isinstance(value, dict | list):
        return all(map(modest, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or not value > 64


@given(_header_edits, st.sampled_from(["file", "sidecar", "inside", "folder"]), st.just([]) | edits, cuts, cuts)
def weights(changes: list[Any], where: str, others: list[Any], torn: list[Any], torn_config: list[Any]) -> None:
    """Load damaged weights with a changed header, and a config in a file or in the header."""
    header, data = _tensors()
    config = changed(_CONFIG, others)
    if isinstance(config, dict) and not modest(config.get("model_args")):
        return
    header = changed(header, changes)
    if where == "inside" and isinstance(header, dict) and isinstance(config, dict):
        header = header | {"__metadata__": {k: json.dumps(v) for k, v in config.items()}}
    head = dumped(header)
    with scratch() as folder:
        file = folder / "mine" / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(cut(struct.pack("<Q", len(head)) + head + data, torn))
        if where in ("sidecar", "folder"):
            beside = file.with_name("config.json" if where == "folder" else "model.json")
            beside.write_bytes(cut(dumped(config), torn_config))
        card = load_card("digits")

        def read() -> None:
            name = choose_base(card, card.preset, str(file.parent if where == "folder" else file))
            module, _ = blueprint(card, name).load()
            assert all(torch.isfinite(v).all() for v in itertools.chain(module.parameters(), module.buffers()))

        judge("weights", read)
