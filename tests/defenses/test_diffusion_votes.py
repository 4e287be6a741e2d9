"""Diffusion defenses that classify several versions of a vote, and consistency models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import BenchError
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs.plan import make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from defenses.diffusion import majority, mean_probability
from tests.helpers.commands import TINY, Bench
from tests.helpers.diffusion_models import CPU, Exact, build, draw, saved, unet

# Several classified versions of one vote --------------------------------------------------------------


def test_a_majority_counts_classes_and_ties_go_to_the_higher_mean_probability() -> None:
    sure, torn = 9.0, 0.1
    # Rows: a majority against a surer minority; two ties, won by the surest vote.
    votes = [
        [[torn, 0, 0], [sure, 0, 0], [torn, 0, 0]],
        [[torn, 0, 0], [0, torn, 0], [0, sure, 0]],
        [[0, sure, 0], [0, 0, torn], [0, 0, torn]],
    ]
    out = majority([torch.tensor(v) for v in votes])
    assert out.floor().tolist() == [[2, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert out.argmax(1).tolist() == [0, 0, 1]
    # Equal in both: the first class.
    equal = majority([torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])])
    assert equal[0, 1] == equal[0, 2] > equal[0, 0] and int(equal.argmax()) == 1


@given(st.integers(1, 9), st.integers(2, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_majority_is_the_most_frequent_class(draws: int, classes: int, seed: int) -> None:
    logits = torch.randn(draws, 8, classes, generator=torch.Generator().manual_seed(seed))
    out = majority([*logits])
    for row in range(8):
        counts = Counter(logits[:, row].argmax(1).tolist())
        best = max(counts.values())
        tied = [c for c, n in counts.items() if n == best]
        chances = logits[:, row].softmax(1).mean(0)
        assert int(out[row].argmax()) == max(tied, key=lambda c: float(chances[c]))


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_mean_is_that_of_probabilities(draws: int, seed: int) -> None:
    logits = 5 * torch.randn(draws, 8, 4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mean_probability([*logits]).exp(), logits.softmax(2).mean(0))


@pytest.mark.parametrize("combine", [majority, mean_probability])
def test_a_row_with_nan_stays_nan(combine: Callable[[list[Tensor]], Tensor]) -> None:
    good, bad = torch.rand(2, 3), torch.rand(2, 3)
    bad[1, 2] = torch.nan
    out = combine([good, bad, good])
    assert out[0].isfinite().all() and out[1].isnan().all()


class Brightness(nn.Module):
    """Class 1 where the mean of an image's pixels is above a half, else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        bright = 40 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-bright, bright, *[torch.full_like(bright, -9.0)] * 8], 1)


def smoothed(tmp_path: Path, *settings: str) -> Any:
    scheduler = diffusers.DDPMScheduler()
    made = build(f"unet={saved(tmp_path, scheduler)}", *settings)
    made.unet = Exact("epsilon", scheduler)
    made.context.base = Brightness()
    return made.eval()


def test_local_smoothing_has_the_probability_of_its_formula(tmp_path: Path) -> None:
    """A copy of a denoised image of mean mu is of class 1 with probability Phi(8 (mu - .5) / sigma): 64 pixels."""
    made = smoothed(tmp_path, "local_copies=1", "local_sigma=.4")
    x = torch.full((4000, 1, 8, 8), 0.7)
    mean = made.denoised(x[:1], draw(1)).mean()
    chance = float(torch.special.ndtr(8 * (mean - 0.5) / 0.4))
    assert 0.6 < chance < 0.9
    single = made.logits(x, draw(4000)).argmax(1).float().mean()
    assert abs(float(single) - chance) < 5 * (chance * (1 - chance) / 4000) ** 0.5
    # A majority of 5 copies has the binomial's probability.
    made = smoothed(tmp_path, "local_copies=5", "local_sigma=.4", "local_vote=majority")
    five = binom.sf(2, 5, chance)
    assert five > chance + 0.05
    found = float(made.logits(x, draw(4000)).argmax(1).float().mean())
    assert abs(found - five) < 5 * (five * (1 - five) / 4000) ** 0.5


def test_votes_of_several_draws_depend_on_their_own_key_alone(tmp_path: Path) -> None:
    made = smoothed(tmp_path, "steps=3", "reverse_runs=2", "local_copies=2", "local_sigma=.4")
    x = torch.rand(16, 1, 8, 8)
    out = made.logits(x, draw(16))
    assert torch.equal(made.logits(x, draw(16)), out)
    part = VoteDraw(Noise(0, "test"), [Vote("estimate", 0, i) for i in (5, 3)], 0.25, CPU)
    assert torch.equal(made.logits(x[[5, 3]], part), out[[5, 3]])
    assert not torch.equal(made.logits(x[[5, 3]], draw(2)), out[[5, 3]])


@pytest.mark.parametrize(
    ("settings", "evaluations", "queries"),
    [
        (("steps=3",), 3, 1),
        (("local_copies=5", "local_sigma=.1"), 1, 5),
        (("steps=2", "reverse_runs=3", "local_copies=5", "local_sigma=.1"), 6, 15),
    ],
)
def test_the_record_states_the_cost_of_all_draws_of_a_vote(
    bench: Bench, tmp_path: Path, settings: tuple[str, ...], evaluations: int, queries: int
) -> None:
    """FLOPs of a vote are those of its evaluations of the UNet and the base, each counted here alone."""
    folder = saved(tmp_path / "unet")
    words = [w for s in (f"unet={folder}", *settings) for w in ("--set", s)]
    ran = bench(
        *("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json", "--examples", 1),
        *words,
    )
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    with FlopCounterMode(display=False) as unet_flops:
        unet()(torch.zeros(1, 1, 8, 8), 100)
    (plan,) = make_plans(RunOptions(defenses="none", dataset=TINY))
    with FlopCounterMode(display=False) as base_flops, torch.no_grad():
        untrained_base(plan.card, plan.base, CPU).module(torch.zeros(1, 1, 8, 8))
    wanted = evaluations * unet_flops.get_total_flops() + queries * base_flops.get_total_flops()
    assert info["cost"]["flops_per_vote"] == wanted
    assert info["cost"]["base_forwards"] == queries * info["cost"]["votes"]


def test_a_step_trains_on_one_run_and_one_copy(tmp_path: Path) -> None:
    made = build(
        f"unet={saved(tmp_path)}", "steps=2", "reverse_runs=3", "local_copies=5", "local_sigma=.1", "classifier=lora"
    )
    counts: list[str] = []
    made.unet.register_forward_hook(lambda *_: counts.append("unet"))
    made.classifier.register_forward_hook(lambda *_: None)
    made.classifier.model.register_forward_hook(lambda *_: counts.append("classifier"))
    x = torch.rand(2, 1, 8, 8)
    made.train().logits(x, draw(2)).sum().backward()
    assert Counter(counts) == {"unet": 2, "classifier": 1}
    counts.clear()
    made.eval().logits(x, draw(2))
    assert Counter(counts) == {"unet": 6, "classifier": 15}


# Consistency models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.12, 0.5, 1.0])
def test_a_consistency_model_denoises_as_diffusers_does(tmp_path: Path, sigma: float) -> None:
    """Its own pipeline's objects at the noise level 2 sigma, for which the scheduler's largest level is set."""
    net, scheduler = unet(), diffusers.CMStochasticIterativeScheduler()
    diffusers.ConsistencyModelPipeline(unet=net, scheduler=scheduler).save_pretrained(tmp_path)
    made = build(f"unet={tmp_path}", sigma=sigma)
    x = 0.5 + 0.3 * torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        found = made.denoised(x, draw(4, sigma))
        theirs = diffusers.CMStochasticIterativeScheduler(sigma_max=2 * sigma)
        theirs.set_timesteps(1)
        (t,) = theirs.timesteps
        noisy = 2 * x - 1
        out = net(theirs.scale_model_input(noisy, t), t).sample
        wanted = theirs.step(out, t, noisy).prev_sample
    torch.testing.assert_close(found, (wanted + 1) / 2, atol=1e-5, rtol=0)
    assert wanted.std() > 0.1  # neither constant nor clipped everywhere


def test_a_consistency_model_is_run_and_recorded(bench: Bench, tmp_path: Path) -> None:
    folder = saved(tmp_path / "unet", diffusers.CMStochasticIterativeScheduler())
    args = ("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json", "--examples", 1)
    ran = bench(*args, "--set", f"unet={folder}")
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    assert info["defense"]["trained_elsewhere"] == [str(folder)]
    (other,) = (saved(tmp_path / "ddpm"),)
    ran = bench(*args, "--set", f"unet={other}")
    assert json.loads(ran.out)[0]["identity"]["defense"]["parts"] != info["identity"]["defense"]["parts"]


@pytest.mark.parametrize(
    ("scheduler", "settings", "sigma", "message"),
    [
        (diffusers.CMStochasticIterativeScheduler(), ["steps=2"], 0.25, "a consistency model .*, which takes 1 step"),
        (diffusers.LCMScheduler(), ["steps=2"], 0.25, "a consistency model .LCMScheduler., which takes 1 step"),
        (diffusers.CMStochasticIterativeScheduler(), ["timestep_scale=1"], 0.25, "asked at its noise level"),
        (diffusers.CMStochasticIterativeScheduler(), [], 50.0, "sigma 50 is not a noise level .*, 0.001 to 40"),
        (diffusers.CMStochasticIterativeScheduler(sigma_min=1.0), [], 0.25, "sigma 0.25 is not a noise level"),
    ],
)
def test_what_a_consistency_model_cannot_do_is_refused(
    tmp_path: Path, scheduler: Any, settings: list[str], sigma: float, message: str
) -> None:
    with pytest.raises(BenchError, match=message) as e:
        build(f"unet={saved(tmp_path, scheduler)}", *settings, sigma=sigma)
    assert "\n" not in str(e.value)
