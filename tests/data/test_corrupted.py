"""Arrays of corrupted images in the layout of CIFAR-10-C, and one line for what is refused."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.data.card import split_names
from bench.data.datasets import load_card, load_split
from bench.errors import BenchError
from tests.helpers import shifted


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CERTBENCH_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["CIFAR-10-C", "cifar10-c"])
def test_a_severity_is_a_fifth_of_the_array(data: Path, name: str) -> None:
    images = shifted.corrupted(data / name)
    card = load_card("cifar10")
    for severity in range(1, 6):
        split = load_split(card, f"test-fog-{severity}")
        rows = slice(10 * (severity - 1), 10 * severity)
        np.testing.assert_array_equal(split.integers(), images[rows].transpose(0, 3, 1, 2))
        assert split.labels.tolist() == list(range(10)) and split.levels == 256
        assert split.name == f"test-fog-{severity}"
        assert split.origin == (
            f"$CERTBENCH_DATA/{name}/fog.npy, severity {severity} of 5, rows {rows.start} to {rows.stop - 1}"
        )


def test_cifar10_has_the_95_parts_of_the_published_archive() -> None:
    card = load_card("cifar10")
    names = split_names(card)
    assert names[:3] == ("train", "validation", "test") and len(names) == len(set(names)) == 3 + 19 * 5
    for name in ("test-fog-3", "test-jpeg_compression-5", "test-gaussian_noise-1"):
        assert name in names
    with pytest.raises(BenchError, match="unknown split of cifar10 'test-fog-6'; did you mean test-fog-5"):
        load_split(card, "test-fog-6")


class _Planted:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def refused(file: str, value: Any, data: Path) -> str:
    """The one line with which an array, or bytes, in place of a file is refused."""
    if not (data / "CIFAR-10-C").exists():
        shifted.corrupted(data / "CIFAR-10-C")
    path = data / "CIFAR-10-C" / file
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif value is None:
        path.unlink()
    else:
        np.save(path, value, allow_pickle=True)
    with pytest.raises(BenchError) as e:
        load_split(load_card("cifar10"), "test-fog-2")
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    return str(e.value)


def test_pickled_objects_are_never_read(data: Path) -> None:
    planted = np.array([_Planted(data / "planted")] * 50, dtype=object)
    for file in ("fog.npy", "labels.npy"):
        assert "not a readable .npy file of numbers" in refused(file, planted, data)
        assert "not a readable .npy file of numbers" in refused(file, pickle.dumps(planted), data)
        assert not (data / "planted").exists()
    # The trap works where pickles are read.
    np.load(io.BytesIO(_saved(planted)), allow_pickle=True)
    assert (data / "planted").exists()


def _saved(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


IMAGES = np.zeros((50, 32, 32, 3), np.uint8)
LABELS = np.zeros(50, np.uint8)


def test_arrays_of_other_types_and_shapes_are_one_line(data: Path) -> None:
    needed = "50 labels and the card's shape need uint8 [50, 32, 32, 3]; get the file again"
    assert f"float32 [50, 32, 32, 3]; {needed}" in refused("fog.npy", IMAGES.astype(np.float32), data)
    assert f"int8 [50, 32, 32, 3]; {needed}" in refused("fog.npy", IMAGES.astype(np.int8), data)
    assert f"uint8 [49, 32, 32, 3]; {needed}" in refused("fog.npy", IMAGES[:49], data)
    assert f"uint8 [50, 3, 32, 32]; {needed}" in refused("fog.npy", IMAGES.transpose(0, 3, 1, 2), data)
    assert "uint8 []" in refused("fog.npy", np.uint8(1), data)
    for torn in (b"", b"x", _saved(IMAGES)[:-1], _saved(IMAGES)[:50], b"PK\x03\x04" + bytes(60)):
        assert "not a readable .npy file of numbers" in refused("fog.npy", torn, data)
    assert "put the arrays of the corruptions there" in refused("fog.npy", None, data)


def test_labels_of_other_types_and_sizes_are_one_line(data: Path) -> None:
    assert "float64 [50]; labels are whole numbers" in refused("labels.npy", LABELS.astype(np.float64), data)
    assert "uint8 [50, 1]; labels are whole numbers" in refused("labels.npy", LABELS[:, None], data)
    assert "49 labels are not 5 severities of one size" in refused("labels.npy", LABELS[:49], data)
    assert "0 labels are not 5 severities" in refused("labels.npy", LABELS[:0], data)
    wrong = np.arange(50)
    assert "row 10: label 10 is not among the card's 10 classes" in refused("labels.npy", wrong, data)
    assert "row 10: label -1 is not among" in refused("labels.npy", np.full(50, -1), data)
    assert "put the arrays" in refused("labels.npy", None, data)


def test_without_a_data_folder_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CERTBENCH_DATA", raising=False)
    with pytest.raises(BenchError, match="set CERTBENCH_DATA to the folder that contains cifar10-c/"):
        load_split(load_card("cifar10"), "test-fog-1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('names = ["fog", "../fog"]', "corruptions.names.1: String should match pattern"),
        ("names = []", "corruptions.names: "),
        ('names = ["fog"]\nlabels = "/etc/x.npy"', "corruptions.labels: '/etc/x.npy' must be a path below"),
        ('names = ["fog"]\narchive = "a/b"', "corruptions.archive: String should match pattern"),
    ],
)
def test_a_faulty_card_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nshape = [3, 8, 8]\nclasses = 2\nsource = { reader = "folder" }\n[corruptions]\n' + text
    )
    with pytest.raises(BenchError) as e:
        load_card(str(tmp_path / "mine.toml"))
    assert message in str(e.value)


def test_a_part_cannot_have_two_sources_of_images(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nshape = [3, 8, 8]\nclasses = 2\ncorruptions = { names = ["fog"] }\n'
        'source = { reader = "folder", parts = { test-fog-1 = "fog" } }\n'
    )
    with pytest.raises(BenchError, match="corruptions: test-fog-1 is a part of the source too; rename one"):
        load_card(str(tmp_path / "mine.toml"))
