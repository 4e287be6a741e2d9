"""Training in bfloat16: what is rounded, what stays in float32, and what a run records of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import globalstate
from bench.data.split import Split
from bench.interface import Draw, Logits, Schedule, StepDraw
from bench.smoothing.noise import Noise
from bench.training import bfloat16, loop, objectives
from tests.helpers.commands import TINY, Bench

RNG = np.random.default_rng(0)
DATA = Split("train", RNG.integers(0, 17, (96, 1, 8, 8)).astype(np.uint8), RNG.integers(0, 3, 96), 17)


class Network(nn.Module):
    """A convolution and a linear layer, which note the types that they compute."""

    def __init__(self) -> None:
        super().__init__()
        with globalstate.fixed_rng(1):
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        self.seen += [x.dtype, hidden.dtype]
        return self.head(hidden.relu().flatten(1))


class Observed:
    """The gaussian objective, which notes the type of its logits and of a product of its own."""

    def __init__(self, calls_without_gradient: int = 0) -> None:
        self.calls, self.seen = calls_without_gradient, list[torch.dtype]()

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draw: StepDraw) -> Tensor:
        def of(images: Tensor, draws: Draw) -> Tensor:
            with torch.no_grad():
                for _ in range(self.calls):
                    logits(images, draws)
            out = logits(images, draws)
            self.seen += [out.dtype, (out @ out.T).dtype]
            return out

        return objectives.gaussian(of, x, y, draw)


def trained(folder: Path, arithmetic: str, objective: Observed, wrap: bool = True) -> tuple[Network, loop.TrainingJob]:
    network = Network()
    job = loop.TrainingJob(
        data=DATA,
        augment=(),
        sigma=0.25,
        objective=bfloat16.logits_alone(objective) if wrap else objective,
        seed=3,
        device=torch.device("cpu"),
        checkpoint=folder / f"{arithmetic}-{objective.calls}.pt",
        progress=lambda *_: None,
        arithmetic=arithmetic,  # type: ignore[arg-type]
    )
    schedule = Schedule(epochs=2, batch=32, optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    job.train(network, lambda x, y, draw: job.objective(lambda z, _: network(z), x, y, draw), schedule)
    return network, job


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max().detach()) for a, b in pairs)


def test_only_the_passes_are_rounded(tmp_path: Path) -> None:
    full, rounded = Observed(), Observed()
    one, job = trained(tmp_path, "float32", full)
    assert set(one.seen) == set(full.seen) == {torch.float32} and not job.used
    other, job = trained(tmp_path, "bfloat16", rounded)
    assert other.seen[:2] == [torch.float32, torch.bfloat16], "images stay as they are, layers round"
    assert set(rounded.seen) == {torch.float32}, "the objective's own arithmetic"
    assert {p.dtype for p in other.parameters()} == {torch.float32} and job.used == {"bfloat16"}
    assert 0 < distance(one, other) < 0.002 < distance(one, Network())


@pytest.mark.parametrize("wrap", [True, False], ids=["objective", "loss of a defense's own"])
def test_passes_without_gradients_do_not_keep_weights_from_being_trained(tmp_path: Path, wrap: bool) -> None:
    """Autocast's cache would keep the weights rounded in a pass without gradients for the next one."""
    one, _ = trained(tmp_path, "bfloat16", Observed(), wrap)
    other, _ = trained(tmp_path, "bfloat16", Observed(calls_without_gradient=1), wrap)
    assert distance(one, other) == 0 < distance(one, Network())


def test_outside_of_training_an_objective_is_as_it_was() -> None:
    """A loop of a defense's own, such as SPSA's finite differences, is not rounded."""
    network, observed = Network(), Observed()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    draw = loop.TrainingDraw(Noise(0, "train"), 0, 1, torch.arange(4), 0.25, torch.device("cpu"), [])
    bfloat16.logits_alone(observed)(lambda z, _: network(z), x, y, draw)
    assert set(network.seen) == set(observed.seen) == {torch.float32}


@pytest.fixture
def card(tmp_path: Path) -> str:
    """The tiny card, whose preset trains in bfloat16."""
    text = Path(TINY).read_text().replace("epoch_scale = 0.1", 'epoch_scale = 0.1\ntraining_arithmetic = "bfloat16"')
    (tmp_path / "rounded.toml").write_text(text)
    return str(tmp_path / "rounded.toml")


def test_a_run_records_the_arithmetic_of_its_training(bench: Bench, card: str, tmp_path: Path) -> None:
    names = "lora,denoiser,none"
    for folder, dataset in (("full", TINY), ("rounded", card)):
        given = ["--set", "denoiser.objective=mse", "--out", str(tmp_path / folder)]
        assert bench("run", "--defense", names, "--dataset", dataset, "--sigma", ".25", *given).code == 0
    records = {
        (folder, found["identity"]["defense"]["name"]): found["identity"]["defense"]
        for folder in ("full", "rounded")
        for found in (json.loads(f.read_text()) for f in (tmp_path / folder).glob("*/run.json"))
    }
    said = {name: one.get("training_arithmetic") for (folder, name), one in records.items() if folder == "rounded"}
    assert said["lora"] == said["denoiser"] == ["bfloat16"], "also where a part is all that is trained"
    assert said["none"] is None
    assert not any("training_arithmetic" in one for (folder, _), one in records.items() if folder == "full")
    assert records["full", "lora"]["weights"] != records["rounded", "lora"]["weights"]
    out = bench("report", str(tmp_path / "rounded")).out
    assert "Forward passes of training were computed in bfloat16 in lora, denoiser" in out.replace(" objective=mse", "")
    assert "bfloat16" not in bench("report", str(tmp_path / "full")).out


def test_verify_trains_again_as_it_was_trained(
    bench: Bench, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    assert bench("run", "--defense", "head", "--dataset", card, "--sigma", ".25", "--out", str(out)).code == 0
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    (run,) = [f.parent for f in out.glob("*/run.json")]
    assert bench("verify", str(run), "--deep").code == 0


def test_another_arithmetic_is_refused_by_name(bench: Bench, card: str) -> None:
    Path(card).write_text(Path(card).read_text().replace('"bfloat16"', '"float16"'))
    found = bench("run", "--defense", "lora", "--dataset", card, "--sigma", ".25")
    assert found.code == 2 and "training_arithmetic" in found.err and "'float32' or 'bfloat16'" in found.err
