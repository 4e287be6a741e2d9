"""Readers on made-up data: their results, and one line for data they refuse."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.data.card import Card
from bench.data.datasets import load_card, load_split, load_splits
from bench.errors import BenchError
from tests.helpers import hubserver
from tests.helpers.madeup import png

CARD = """
name = "mine"
shape = [3, 8, 8]
classes = 3
[source]
reader = "parquet"
folder = "data"
train = "train.parquet"
"""


def column(encoded: Sequence[bytes | None]) -> Any:
    """Return the hub's column; its path must never be opened."""
    return [None if b is None else {"bytes": b, "path": "/etc/passwd"} for b in encoded]


def rows(count: int = 30) -> dict[str, Any]:
    return {"image": column([png() for _ in range(count)]), "label": [i % 3 for i in range(count)]}


def parquet(data: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(data), out, row_group_size=7)
    return out.getvalue()


@pytest.fixture
def card(tmp_path: Path) -> Callable[..., Card]:
    """Write the card and its train file, and load the card; ``old, new`` changes the card's text."""

    def make(data: dict[str, Any] | bytes | None = None, *change: str) -> Card:
        (tmp_path / "data").mkdir(exist_ok=True)
        if data is not None:
            (tmp_path / "data" / "train.parquet").write_bytes(data if isinstance(data, bytes) else parquet(data))
        path = tmp_path / "mine.toml"
        path.write_text(CARD.replace(change[0], change[1]) if change else CARD)
        return load_card(str(path))

    return make


def refusal(card: Card) -> str:
    """Return the one-line error of reading the card's complete train split."""
    with pytest.raises(BenchError) as e:
        load_split(card, "train").pixels(slice(None))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_parquet_gives_the_pictures_that_were_put_in(card: Callable[..., Card]) -> None:
    data = rows()
    train, validation, test = load_splits(card(data), "train", "validation", "test")
    assert (len(train), len(validation), len(test)) == (24, 3, 3)
    seen = set()
    for split in (train, validation, test):
        images: Any = split.images
        for at, row in enumerate(images.rows.tolist()):
            wanted = np.asarray(Image.open(io.BytesIO(data["image"][row]["bytes"]))).transpose(2, 0, 1)
            np.testing.assert_array_equal(split.integers([at])[0], wanted)
            assert split.labels[at] == data["label"][row]
            seen.add(row)
    assert len(seen) == 30
    assert train.origin == "data"


def test_parts_in_several_files_and_bare_bytes(tmp_path: Path, card: Callable[..., Card]) -> None:
    one: dict[str, Any] = rows(9)
    two: dict[str, Any] = {"image": [png() for _ in range(5)], "label": [1] * 5}
    names = 'train = ["train.parquet", "b.parquet"]\ntest = "b.parquet"'
    made = card(one, 'train = "train.parquet"', names)
    (tmp_path / "data" / "b.parquet").write_bytes(parquet(two))
    train, test = load_splits(made, "train", "test")
    assert len(test) == 5
    images: Any = train.images
    assert sorted(images.rows.tolist() + load_split(made, "validation").images.rows.tolist()) == list(range(14))  # type: ignore[union-attr]
    last = images.rows.tolist().index(13)
    np.testing.assert_array_equal(train.integers([last]), test.integers([4]))
    (tmp_path / "data" / "b.parquet").write_bytes(parquet({**two, "image": [*two["image"][:4], b"no picture"]}))
    assert "b.parquet: row 4: not a readable picture" in refusal(made)


@pytest.mark.parametrize(("stated", "said"), [(30, False), (40, True), (20, True)])
def test_a_copy_with_another_number_of_rows_is_reported(
    card: Callable[..., Card], capsys: pytest.CaptureFixture[str], stated: int, said: bool
) -> None:
    plain = card(rows())
    changed = card(None, 'reader = "parquet"', f'reader = "parquet"\nrows = {{ train = {stated} }}')
    train = load_split(changed, "train")
    remark = f"30 rows of the train part, which has {stated} in the complete data set"
    assert (remark in train.origin, remark in capsys.readouterr().err) == (said, said)
    assert changed.sha256() == plain.sha256() and len(train) == 24


def test_a_changed_picture_or_cut_changes_the_hash(card: Callable[..., Card]) -> None:
    data = rows()
    before = load_split(card(data), "train").sha256()
    assert load_split(card(data), "train").sha256() == before
    assert load_split(card(data, 'folder = "data"', 'folder = "data"\nresize = 9'), "train").sha256() != before
    data["label"] = [(i + 1) % 3 for i in range(30)]
    assert load_split(card(data), "train").sha256() != before
    data["image"] = column([png() for _ in range(30)])
    assert load_split(card(data), "train").sha256() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0] * 29 + [3]}, "row 29: label 3 is not among the card's 3 classes"),
        ({"label": [-1] + [0] * 29}, "row 0: label -1 is not among"),
        ({"label": [0, None] + [0] * 28}, "row 1: column 'label' is empty"),
        ({"label": [0.5] * 30}, "column 'label' holds double, not whole numbers"),
        ({"label": ["cat"] * 30}, "column 'label' holds string, not whole numbers"),
        ({"image": ["cat"] * 30}, "column 'image' holds string, not the bytes of pictures"),
        ({"image": column([png()] * 4 + [None] * 26)}, "row 4: column 'image' is empty"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 30}, "not the bytes of pictures"),
        ({"image": column([png()] * 4 + [b"GIF89a"] * 26)}, "not a readable picture"),
        ({"image": column([png(size=(64, 64), kind="JPEG")[:-300]] * 30)}, "not a readable picture"),
        ({"image": column([b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"] * 30)}, "not a readable picture"),
        ({"image": column([png(size=(8, 9))] * 30)}, "9x8 pixels, but the card's shape is 8x8; set resize"),
        ({"image": column([png("I;16")] * 30)}, "mode I;16, but the card's 3 channels need 8 bits"),
    ],
)
def test_rows_that_do_not_match_the_card_are_refused(
    card: Callable[..., Card], change: dict[str, Any], message: str
) -> None:
    line = refusal(card(rows() | change))
    assert message in line
    assert "train.parquet" in line


def test_files_that_are_not_parquet(card: Callable[..., Card]) -> None:
    whole = parquet(rows())
    for bad in (b"", b"no parquet", whole[:-9], whole[:200], whole[:4] + bytes(len(whole) - 8) + whole[-4:]):
        assert "train.parquet: not a readable parquet file" in refusal(card(bad))
    assert "not a readable parquet file: UnicodeDecodeError" in refusal(card(whole.replace(b"label", b"\xffabel")))
    flipped = bytearray(whole)
    flipped[40 : len(whole) // 2] = bytes(len(whole) // 2 - 40)
    assert "train.parquet" in refusal(card(bytes(flipped)))
    assert "no columns 'image'; it has picture, label" in refusal(card({"picture": [b""], "label": [0]}))
    assert "no columns 'label'" in refusal(card({"image": [b""]}))
    twice = pa.table([pa.array([b""]), pa.array([b""]), pa.array([0])], names=["image", "image", "label"])
    pq.write_table(twice, out := io.BytesIO())
    assert "2 columns 'image'" in refusal(card(out.getvalue()))
    assert "is empty" in refusal(card({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}))
    assert "the 2 images of its train part are too few for 1 for test and 1 for val" in refusal(card(rows(2)))


def test_a_missing_file_is_named_with_its_folder(card: Callable[..., Card], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no file" in refusal(card())
    elsewhere = card(None, 'folder = "data"', "")
    monkeypatch.delenv("CERTBENCH_DATA", raising=False)
    assert "set CERTBENCH_DATA to the folder that contains mine/" in refusal(elsewhere)


def test_a_decompression_bomb_is_refused(card: Callable[..., Card], monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (2000, 3000):  # Pillow refuses above twice its limit and warns below that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "decompression bomb" in refusal(card({"image": column([png(size=(70, 70))] * 30), "label": [0] * 30}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    long = {"image": column([png(size=(400, 2))] * 30), "label": [0] * 30}
    assert "too elongated" in refusal(card(long, 'folder = "data"', 'folder = "data"\nresize = 8'))


def test_one_channel_takes_grey_only(card: Callable[..., Card]) -> None:
    grey = {"image": column([png("L")] * 30), "label": [0] * 30}
    assert load_split(card(grey, "[3, 8, 8]", "[1, 8, 8]"), "train").pixels([0]).shape == (1, 1, 8, 8)
    assert "mode RGB, but the card's 1 channel needs grey" in refusal(card(rows(), "[3, 8, 8]", "[1, 8, 8]"))


HUB_CARD = CARD.replace('folder = "data"', 'hub = "someone/pictures"')


def test_the_hub_serves_what_is_not_in_the_folder(
    tmp_path: Path, card: Callable[..., Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CERTBENCH_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    data = rows()
    made = card(None, CARD, HUB_CARD)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "no network" in refusal(made)
    assert "set CERTBENCH_DATA to a folder that has mine/train.parquet" in refusal(made)
    with hubserver.HubServer({("dataset", "someone/pictures", "train.parquet"): parquet(data)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        train = load_split(made, "train")
        assert train.origin == f"hub someone/pictures@{hubserver.COMMIT}"
        assert "the hub has no dataset 'no/pictures'" in refusal(
            card(None, CARD, HUB_CARD.replace("someone/pictures", "no/pictures"))
        )
        # A local copy in the hub's layout comes first, and has the same hash.
        local = tmp_path / "local"
        (local / "mine").mkdir(parents=True)
        (local / "mine" / "train.parquet").write_bytes(parquet(data))
        monkeypatch.setenv("CERTBENCH_DATA", str(local))
        asked = len(server.requests)
        found = load_split(made, "train")
        assert found.origin == "$CERTBENCH_DATA/mine"
        assert len(server.requests) == asked
        assert found.sha256() == train.sha256()
        assert found.sha256([0, 3]) == train.sha256([0, 3])


def test_the_cifar10_card_downloads_its_pinned_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTBENCH_DATA", str(tmp_path))  # exists, but has no cifar10/
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    made = parquet({"img": column([png(size=(32, 32)) for _ in range(12)]), "label": [i % 10 for i in range(12)]})
    with hubserver.HubServer({("dataset", "uoft-cs/cifar10", "plain_text/test-00000-of-00001.parquet"): made}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        card = load_card("cifar10")
        test = load_split(card, "test")
        assert test.origin.startswith("hub uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2; 12 rows of")
        assert test.pixels(slice(None)).shape == (12, 3, 32, 32)
        assert "has no file 'plain_text/train-00000-of-00001.parquet'" in refusal(card)
