"""``bench run`` reports what it leaves out or converts of its data; unusual locales and no network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import encoded
from tests.helpers.madeup import RNG, png

Bench = Callable[..., Any]

CARD = """
name = "pets"
shape = [3, 8, 8]
source = {{ reader = "folder", folder = "{folder}", train = "train", test = "test" }}
splits = {{ validation = 2 }}
presets.quick = {{ examples = 4, n0 = 5, n = 20 }}

[bases.small]
model = "vit_tiny_patch16_224"
args = {{ img_size = 8, patch_size = 4, embed_dim = 16, depth = 1, num_heads = 2 }}
schedule = {{ epochs = 1 }}
"""


def made(
    root: Path,
    folder: str = "pets",
    classes: tuple[str, ...] = ("cat2", "cat10"),
    picture: Callable[[], bytes] = png,
) -> Path:
    """Write the card and its pictures; return the card's file."""
    for part in ("train", "test"):
        for name in classes:
            place = root / folder / part / name
            place.mkdir(parents=True)
            for i in range(4):
                (place / f"{i}.png").write_bytes(picture())
    path = root / "pets.toml"
    path.write_text(CARD.format(folder=folder), encoding="utf-8")
    return path


def test_the_first_lines_and_the_record_state_what_was_changed(bench: Bench, tmp_path: Path) -> None:
    card = made(tmp_path, picture=lambda: encoded.png(RNG.integers(0, 256, (8, 8, 4)), encoded.RGBA))
    (tmp_path / "pets" / "test" / "cat2" / "scan.avif").write_bytes(b"")
    os.rename(tmp_path / "pets" / "test" / "cat2" / "0.png", tmp_path / "pets" / "test" / "cat2" / "0.JFIF")
    result = bench("run", "--defense", "none", "--dataset", card, "--out", tmp_path / "runs")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert "train: classes in natural order, as in timm: class 0 is 'cat2'" in lines[0]
    assert "test: 8 pictures (7 .png, 1 .jfif), left out: 1 .avif; suffixes that are read: .bmp" in lines[1]
    assert sum("transparency dropped; reported once" in line for line in lines) == 2  # of train, of test
    (run,) = (tmp_path / "runs").glob("*/run.json")
    data = json.loads(run.read_text())["data"]
    assert data["test"].startswith(
        "pets/test; 8 pictures (7 .png, 1 .jfif), left out: 1 .avif; suffixes that are read: "
    )
    assert data["test"].endswith("; 4 of its pictures: transparency dropped")  # of the 4 that are certified
    assert data["train"].startswith("pets/train; classes in natural order")
    log = (run.parent / "log.txt").read_text()
    assert "left out: 1 .avif" in log and "transparency dropped" in log
    report = bench("report", tmp_path / "runs").out
    assert "As recorded of the test images' source: 4 of its pictures: transparency dropped." in " ".join(
        report.split()
    )
    # A second run trains nothing, and reports the same.
    again = bench("run", "--defense", "none", "--dataset", card, "--seed", "1", "--out", tmp_path / "runs")
    assert "left out: 1 .avif" in again.err and "test/cat2/0.JFIF: transparency dropped" in again.err


def test_deep_pictures_end_the_run_before_anything_is_trained(bench: Bench, tmp_path: Path) -> None:
    card = made(tmp_path, picture=lambda: png("I;16"))
    result = bench("run", "--defense", "none", "--dataset", card, "--out", tmp_path / "runs")
    assert result.code == 2
    assert "mode I;16, but the card's 3 channels need 8 bits a channel; convert the pictures" in result.err
    assert not list((tmp_path / "runs").glob("*/run.json"))


def test_one_class_folder_is_one_line(bench: Bench, tmp_path: Path) -> None:
    result = bench("run", "--defense", "none", "--dataset", made(tmp_path, classes=("only",)))
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "train: only one class folder, 'only'; a classifier needs at least two classes" in result.err


@pytest.mark.skipif(sys.platform != "linux", reason="the locale decides the encoding of file names")
def test_names_in_any_script_work_under_an_ascii_locale(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, folder="toy\u00e9", classes=("\u00e9t\u00e9", "hiver"))
    words = ["run", "--defense", "none", "--dataset", "./pets.toml", "--out"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", *words, "C"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | locale, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert bench(*words, "UTF-8").code == 0
    runs = {name: next((tmp_path / name).glob("*/run.json")) for name in ("C", "UTF-8")}
    found = {name: json.loads(run.read_text(encoding="utf-8")) for name, run in runs.items()}
    assert found["C"]["classes"] == ["hiver", "\u00e9t\u00e9"]
    assert found["C"]["data"]["test"] == "toy\u00e9/test"
    assert found["C"]["identity"] == found["UTF-8"]["identity"]


# No network ------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[str]:
    """An endpoint that accepts connections and never answers, like a network that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CERTBENCH_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)


def timed(bench: Bench, out: Path) -> tuple[float, str]:
    began = time.perf_counter()
    result = bench("run", "--defense", "none", "--dataset", "cifar10", "--out", out)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "set CERTBENCH_DATA to a folder that has cifar10/plain_text/train" in result.err
    return time.perf_counter() - began, result.err


@pytest.mark.usefixtures("nothing_cached")
def test_no_answer_ends_a_run_in_seconds(
    bench: Bench, tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    seconds, line = timed(bench, tmp_path)
    assert "no network (no answer in 5 s; HF_HUB_ETAG_TIMEOUT sets the timeout)" in line
    assert seconds < 10
    assert timed(bench, tmp_path)[0] < 4  # no retry at once


@pytest.mark.usefixtures("nothing_cached")
def test_a_name_server_that_does_not_answer_ends_a_run_in_seconds(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
    seconds, line = timed(bench, tmp_path)
    assert "no answer in 1 s" in line
    assert seconds < 6


@pytest.mark.usefixtures("nothing_cached")
def test_offline_ends_a_run_at_once(bench: Bench, tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seconds, line = timed(bench, tmp_path)
    assert "HF_HUB_OFFLINE is set" in line
    assert seconds < 4
