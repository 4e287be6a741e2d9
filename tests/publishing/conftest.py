"""A hub on this machine, and runs that were trained here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.helpers.publishinghub import TOKEN, PublishingHub

ROOT = Path(__file__).parents[2]
CARD = "tests/tiny.toml"  # a relative path, which a published record keeps


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PublishingHub]:
    with PublishingHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # for other processes; this one has read it at import
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of lora and one of none, trained and certified here."""
    from bench.cli import main

    out = tmp_path_factory.mktemp("trained") / "runs"
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["run", "--defense", "none,lora", "--dataset", CARD, "--set", "lora.rank=2", "--out", str(out)])
    finally:
        os.chdir(before)
    assert not stop.value.code
    return out
