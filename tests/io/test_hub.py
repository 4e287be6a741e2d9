"""bench.io.hub against a local server that speaks the hub's protocol."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.io.hub import commit, fetch
from tests.helpers import hubserver

FILES = {
    ("dataset", "someone/pictures", "data/train.parquet"): b"rows",
    ("model", "someone/vit", "model.safetensors"): b"weights",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with hubserver.HubServer(FILES) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_a_file_is_downloaded_once_and_its_commit_known(hub: Any) -> None:
    path = fetch("someone/pictures", "data/train.parquet", "main", "dataset")
    assert path.read_bytes() == b"rows"
    assert commit(path) == hubserver.COMMIT
    assert fetch("someone/pictures", "data/train.parquet", "main", "dataset") == path
    assert sum(r.startswith("GET /datasets") for r in hub.requests) == 1
    assert fetch("someone/vit", "model.safetensors", "main", "model").read_bytes() == b"weights"


def test_a_pinned_commit_in_the_cache_needs_no_network(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = "a" * 40
    path = fetch("someone/pictures", "data/train.parquet", pinned, "dataset")
    asked = len(hub.requests)
    assert fetch("someone/pictures", "data/train.parquet", pinned, "dataset") == path
    assert len(hub.requests) == asked
    assert commit(path) == pinned


@pytest.mark.parametrize(
    ("repo", "name", "revision", "message"),
    [
        ("someone/nothing", "x", "main", "the hub has no dataset 'someone/nothing'"),
        ("someone/pictures", "x", "main", "has no file 'x'"),
        ("someone/pictures", "data/train.parquet", "v9", "has no revision 'v9'"),
        ("not an id", "x", "main", "cannot download x of hub dataset 'not an id'"),
        ("someone/pictures", "../../x", "main", "../../x"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_missing_repositories_and_files_are_one_line(repo: str, name: str, revision: str, message: str) -> None:
    with pytest.raises(BenchError) as e:
        fetch(repo, name, revision, "dataset")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("revision", ["main", "b" * 40])
def test_no_network_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    started = time.perf_counter()
    with pytest.raises(BenchError, match=r"no copy of x of hub .*no network .*: put it elsewhere") as e:
        fetch("someone/pictures", "x", revision, "dataset", fix="put it elsewhere")
    assert time.perf_counter() - started < 5
    assert "\n" not in str(e.value)


def test_no_network_falls_back_to_the_cached_copy(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch("someone/pictures", "data/train.parquet", "main", "dataset")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch("someone/pictures", "data/train.parquet", "main", "dataset") == path
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert fetch("someone/pictures", "data/train.parquet", "main", "dataset") == path
    assert len(hub.requests) == asked
