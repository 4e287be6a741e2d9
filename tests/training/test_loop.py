"""The training loop: a resumed training gives the same weights, and divergence is reported."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import globalstate
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Draw, Schedule
from bench.smoothing.noise import Noise, TrainDraw
from bench.training import loop, objectives

RNG = np.random.default_rng(0)
DATA = Split("train", RNG.integers(0, 17, (100, 1, 8, 8)).astype(np.uint8), RNG.integers(0, 3, 100), 17)


def network() -> nn.Module:
    with globalstate.fixed_rng(1):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3))


class Killed(Exception):
    pass


def train(folder: Path, *, die_at: int = 10**9, **schedule: object) -> nn.Module:
    """Train a small network; ``die_at`` raises in the loss at that call, as a kill would end the process."""
    module, calls = network(), 0

    def loss(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == die_at:
            raise Killed
        return objectives.gaussian(lambda z, _: module(z), x, y, draw)

    job = loop.TrainingJob(
        data=DATA,
        augment=("crop", "flip"),
        sigma=0.25,
        objective=objectives.gaussian,
        seed=3,
        device=torch.device("cpu"),
        checkpoint=folder / "checkpoint.pt",
        progress=lambda *_: None,
        spent=[],
    )
    job.train(module, loss, Schedule(**{"epochs": 5, "batch": 16, **schedule}))  # type: ignore[arg-type]
    return module


def test_global_random_states_are_seeded_and_restored() -> None:
    """Those of torch, numpy and Python, also after an error."""

    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()
    found = []
    for _ in range(2):
        with globalstate.fixed_rng(3):
            found.append(drawn())
    with globalstate.fixed_rng(4):
        other = drawn()
    with pytest.raises(ZeroDivisionError), globalstate.fixed_rng(3):
        1 // int(drawn() is None)
    assert found[0] == found[1] and not set(found[0]) & set(other)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state(legacy=False)["state"]["key"].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_training_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    (tmp_path / "a").mkdir()
    undisturbed = train(tmp_path / "a", optimizer=optimizer, lr=0.01)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(tmp_path, die_at=14, optimizer=optimizer, lr=0.01)
    assert (tmp_path / "checkpoint.pt").exists()
    resumed = train(tmp_path, optimizer=optimizer, lr=0.01)
    for (key, one), (_, other) in zip(undisturbed.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_divergence_is_one_line_that_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"diverged.*--set lr"):
        train(tmp_path, lr=1e30, optimizer="sgd")


@pytest.mark.parametrize("damage", ["one bit", "cut short", "empty"])
def test_a_corrupt_checkpoint_is_reported_and_training_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    undisturbed = train(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        train(tmp_path, die_at=14)
    data = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    kept = {"one bit": bytes(data), "cut short": bytes(data[:100]), "empty": b""}[damage]
    (tmp_path / "checkpoint.pt").write_bytes(kept)
    again = train(tmp_path)
    assert f"bench: corrupt checkpoint {tmp_path}/checkpoint.pt" in capsys.readouterr().err
    for (key, one), (_, other) in zip(undisturbed.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), key


def test_every_epoch_sees_each_image_once(tmp_path: Path) -> None:
    seen: list[int] = []
    data = Split("train", np.arange(50, dtype=np.uint8)[:, None, None, None], np.arange(50), 256)
    job = loop.TrainingJob(data, (), 0.0, objectives.clean, 0, torch.device("cpu"), tmp_path / "c", lambda *_: None, [])
    weight = nn.Linear(1, 50)

    def loss(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        seen.extend(y.tolist())
        return weight(x.flatten(1)).sum()

    job.train(weight, loss, Schedule(epochs=4, batch=8))
    assert len(seen) == 200
    for epoch in range(4):
        assert sorted(seen[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert seen[:50] != seen[50:100]


def test_a_constant_rate_does_not_decay(tmp_path: Path) -> None:
    one = nn.Linear(1, 1, bias=False)
    before = one.weight.item()
    job = loop.TrainingJob(DATA, (), 0.0, objectives.clean, 0, torch.device("cpu"), tmp_path / "c", lambda *_: None, [])
    schedule = Schedule(1, batch=10, optimizer="sgd", lr=0.01, momentum=0.0, weight_decay=0.0, decay="constant")
    job.train(one, lambda x, y, d: one.weight.sum(), schedule)
    assert one.weight.item() == pytest.approx(before - 10 * 0.01)  # ten steps on a slope of 1


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    module = network()
    norm = module.get_submodule("1").requires_grad_(False)
    before = norm.get_buffer("running_mean").clone()
    job = loop.TrainingJob(
        DATA, (), 0.25, objectives.gaussian, 0, torch.device("cpu"), tmp_path / "c", lambda *_: None, []
    )
    job.train(module, lambda x, y, d: objectives.gaussian(lambda z, _: module(z), x, y, d), Schedule(epochs=1))
    assert torch.equal(norm.get_buffer("running_mean"), before)


def test_gaussian_adds_noise_of_sigma_to_clean_pixels() -> None:
    seen: list[Tensor] = []

    def logits(z: Tensor, draw: Draw) -> Tensor:
        seen.append(z)
        return torch.zeros(len(z), 2)

    x = torch.rand(200, 1, 8, 8)
    draw = TrainDraw(Noise(0, "train"), 0, 200, 0.25, torch.device("cpu"))
    objectives.gaussian(logits, x, torch.zeros(200, dtype=torch.int64), draw)
    noise = seen[0] - x
    # 12,800 normals: five standard errors.
    assert abs(float(noise.std()) - 0.25) < 5 * 0.25 / (2 * 12_800) ** 0.5
    assert abs(float(noise.mean())) < 5 * 0.25 / 12_800**0.5
