"""The cache of trained weights: an identity is trained once, and a corrupt entry again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.training.weights import Trained, Weights, cached_training, stored

CALLS: list[Path] = []


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    CALLS.clear()


def train(checkpoint: Path) -> Weights:
    CALLS.append(checkpoint)
    checkpoint.write_bytes(b"")
    checkpoint.with_name("checkpoint-stage.pt").write_bytes(b"")
    return {"w": torch.full((2,), float(len(CALLS)))}, {"train_seconds": 3.0}


def made(seed: int = 0) -> Trained:
    return cached_training("some", {"seed": seed, "size": (1, 2)}, train)


def test_an_identity_is_trained_once() -> None:
    first, second, other = made(), made(), made(1)
    assert [float(t.state["w"][0]) for t in (first, second, other)] == [1, 1, 2]
    assert first.sha256 == second.sha256 != other.sha256
    assert second.meta["train_seconds"] == 3.0
    assert stored(first.sha256) and not stored("0" * 64)
    assert [list(c.parent.glob("*.pt")) for c in CALLS] == [[], []]


@pytest.mark.parametrize(
    ("file", "data"), [("weights.safetensors", b"?"), ("meta.json", b"{"), ("meta.json", b'{"identity": {}}')]
)
def test_a_corrupt_entry_is_reported_and_trained_again(
    file: str, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    made()
    (CALLS[0].parent / file).write_bytes(data)
    assert float(made().state["w"][0]) == 2
    assert "corrupt cache entry" in capfd.readouterr().err
    assert float(made().state["w"][0]) == 2


def test_a_failed_training_stores_nothing_and_keeps_its_checkpoint() -> None:
    def fail(checkpoint: Path) -> Weights:
        train(checkpoint)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached_training("some", {"seed": 0}, fail)
    assert CALLS[0].exists()
    assert float(cached_training("some", {"seed": 0}, train).state["w"][0]) == 2
    assert CALLS[0] == CALLS[1]
