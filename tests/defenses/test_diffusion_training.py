"""The diffusion model that is trained here, and the classifier trained behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from bench import globalstate
from bench.data.datasets import load_split
from bench.interface import Schedule
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.plan import make_plans
from bench.training import loop, objectives
from bench.training.diffusion import Diffusion
from tests.helpers.commands import TINY, Bench
from tests.helpers.diffusion_models import CPU, build, draw, saved, unet


def test_the_model_trained_here_is_shared_by_noise_levels_and_takes_noise_away(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json")
    ran = bench(*args, "--sigma", "0.25,0.5", "--examples", 2)
    assert ran.code == 0, ran.err
    one, other = json.loads(ran.out)
    assert one["identity"]["defense"]["parts"] == other["identity"]["defense"]["parts"]
    assert one["cost"]["train_seconds"] == other["cost"]["train_seconds"] > 0
    made = build()
    assert one["cost"]["trained_here"] == sum(p.numel() for p in made.unet.parameters())
    assert one["cost"]["trained_elsewhere"] == one["cost"]["trainable_nominal"] == 0

    (plan,) = make_plans(RunOptions(defenses="diffusion", dataset=TINY))
    train = load_split(plan.card, "train").first(200)  # as the preset cuts it: from the cache
    base = untrained_base(plan.card, plan.base, CPU)
    fitted = fitting.fit(plan, base, train, CPU, lambda *_: pytest.fail("trained again"))
    clean = torch.from_numpy(load_split(plan.card, "validation").pixels(slice(None)))
    noisy = clean + 0.25 * draw(len(clean)).normal(*clean.shape[1:])
    with torch.inference_mode():
        denoised = fitted.defense.denoised(noisy, draw(len(clean)))  # type: ignore[operator]
    # After 37 steps of training it already removes more noise than clipping to [0, 1].
    assert (denoised - clean).square().mean() < 0.75 * (noisy.clamp(0, 1) - clean).square().mean()


def test_a_classifier_is_trained_behind_the_denoiser(bench: Bench, tmp_path: Path) -> None:
    ran = bench(
        *("run", "--defense", "diffusion,lora", "--dataset", TINY, "--out", tmp_path, "--json", "--examples", 2),
        *("--set", "classifier=lora", "--set", f"unet={saved(tmp_path / 'unet')}"),
    )
    assert ran.code == 0, ran.err
    both, alone = json.loads(ran.out)
    assert both["defense"]["access"] == "WEIGHTS"
    assert both["cost"]["trainable_nominal"] == alone["cost"]["trainable_nominal"] > 0
    assert both["cost"]["trainable_updated"] > 0
    assert both["cost"]["trained_elsewhere"] == sum(p.numel() for p in unet().parameters())
    assert both["cost"]["train_seconds"] > 0
    assert "lora inside" in both["identity"]["defense"]["parts"]


class Steps:
    """A job of three steps, after each of which all weights are 1, 2 and 3."""

    def train(self, module: nn.Module, loss: Any, schedule: Schedule) -> None:
        for value in (1.0, 2.0, 3.0):
            x = torch.rand(4, 1, 8, 8)
            assert loss(x, None, draw(4)).isfinite()
            for p in module.parameters():
                nn.init.constant_(p, value)


def test_the_average_of_the_weights_is_used() -> None:
    part = Diffusion(width=8, schedule=Schedule(), ema=0.2)
    module: Any = part.build(10, (1, 8, 8))
    first = parameters_to_vector(module.net.parameters()).detach()
    part.fit(module, Steps())  # type: ignore[arg-type]
    average = first
    # The decay is (1 + n) / (10 + n) while that is below .2.
    values: list[Any] = [first, 1.0, 2.0, 3.0]
    for value, decay in zip(values, (1 / 10, 2 / 11, 0.2, 0.2), strict=True):
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(parameters_to_vector(module.net.parameters()).detach(), average)


class Killed(Exception):
    pass


def test_a_killed_training_resumes_to_the_same_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    (plan,) = make_plans(RunOptions(defenses="diffusion", dataset=TINY))
    data = load_split(plan.card, "train").first(64)
    part = Diffusion(width=8, schedule=Schedule(epochs=7.5, batch=16), timesteps=100)

    def fit(folder: str, die_at: int = 0) -> dict[str, Tensor]:
        def progress(done: int, count: int, loss: float) -> None:
            if done == die_at:
                raise Killed

        (tmp_path / folder).mkdir(exist_ok=True)
        with globalstate.fixed_rng(1):
            module = part.build(10, plan.card.shape)
        checkpoint = tmp_path / folder / "checkpoint.pt"
        part.fit(module, loop.TrainingJob(data, (), 0.0, objectives.clean, 3, CPU, checkpoint, progress, []))
        return module.state_dict()

    undisturbed = fit("a")
    with pytest.raises(Killed):
        fit("b", die_at=20)
    assert (tmp_path / "b" / "checkpoint.pt").exists()
    resumed = fit("b")
    assert int(resumed["updates"]) == 31  # 30 steps, and once after the last
    for key, value in undisturbed.items():
        assert torch.equal(resumed[key], value), key
