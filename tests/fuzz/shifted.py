"""Fuzz tables of pictures and arrays of corrupted images."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bench.data.datasets import load_card, load_split
from tests.fuzz.judging import cut, cuts, judge, scratch
from tests.helpers.madeup import png

Cuts = list[tuple[int, int, bytes]]
PICTURE = png()
TABLE = """
name = "mine"
shape = [3, 8, 8]
classes = ["a", "b", "c"]
splits = { test = 1, validation = 1 }
[source]
reader = "csv"
folder = "."
path = "{at}/{file}"
label = "label"
domain = "domain"
train = { part = "train" }
"""
ARRAYS = """
name = "mine"
shape = [3, 8, 8]
classes = 3
source = { reader = "folder", folder = "." }
corruptions = { names = ["fog"], folder = "." }
"""


def _read(folder: Path, split: str) -> None:
    """Load a split as a run does, and decode each picture."""
    found = load_split(load_card(str(folder / "card.toml")), split)
    assert len(found.sha256()) == 64
    pixels = found.integers()
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (3, 8, 8) and len(pixels) == len(found) > 0
    assert found.labels.min() >= 0 and found.labels.max() < 3


_titles = st.permutations(["at", "file", "label", "domain", "part", "more"]) | st.lists(st.text(max_size=5), max_size=6)
_values = {
    "at": st.sampled_from(["x", "x", "x", "..", "/etc", "x/../..", "\0", ""]),
    "label": st.sampled_from(["a", "b", "c", "0", "1", "2", "2", "d", "-1", "3", "é"]),
    "domain": st.text(max_size=3),
    "part": st.sampled_from(["train"] * 8 + ["test", ""]),
}
_cells = st.fixed_dictionaries(_values)


@given(
    _titles, st.lists(_cells, max_size=8), cuts, st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
)
def tables(titles: list[str], rows: list[dict[str, str]], torn: Cuts, encoding: str) -> None:
    """Read a damaged table whose rows name pictures, other files, and classes that exist or not."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(titles)
    sound = [{"at": "x", "label": label, "domain": "d", "part": "train"} for label in "abc"]
    for number, row in enumerate([*rows, *sound]):
        writer.writerow([(row | {"file": f"{number}.png"}).get(title, "") for title in titles])
    with scratch() as folder:
        (folder / "x").mkdir()
        for number in range(len(rows) + 3):
            (folder / "x" / f"{number}.png").write_bytes(PICTURE)
        (folder / "metadata.csv").write_bytes(cut(text.getvalue().encode(encoding, "replace"), torn))
        (folder / "card.toml").write_text(TABLE)
        judge("table", lambda: _read(folder, "train"))


_DTYPES = ["u1"] * 6 + ["i1", ">u2", "f4", "O", "U3", "M8[s]", "V8", "?"]


@given(
    st.sampled_from(_DTYPES),
    st.sampled_from(["u1", "u1", "<i8", ">i4", "f8", "O"]),
    st.sampled_from([(8, 8, 3)] * 5 + [(3, 8, 8), (8, 8), (), (0, 8, 3)]),
    st.booleans(),
    cuts,
    cuts,
)
def arrays(kind: str, labels: str, shape: tuple[int, ...], fortran: bool, torn: Cuts, also: Cuts) -> None:
    """Read damaged .npy files of many types and shapes; objects are never unpickled."""
    with scratch() as folder:
        for name, array, damage in (
            ("fog", np.zeros((10, *shape), kind), torn),
            ("labels", (np.arange(10) % 3).astype(labels), also),
        ):
            out = io.BytesIO()
            np.save(out, np.asfortranarray(array) if fortran else array, allow_pickle=True)
            (folder / f"{name}.npy").write_bytes(cut(out.getvalue(), damage))
        os.makedirs(folder / "train" / "a")
        (folder / "card.toml").write_text(ARRAYS)
        judge("corrupted images", lambda: _read(folder, "test-fog-4"))
