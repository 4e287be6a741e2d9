"""Diffusion denoising: its arithmetic compared with closed forms, external checkpoints, and the model trained here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.flop_counter import FlopCounterMode

from bench import globalstate
from bench.data.datasets import load_split
from bench.errors import BenchError
from bench.interface import Schedule
from bench.models import unets
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.doctor import examine
from bench.runs.plan import make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from bench.training import loop, objectives
from bench.training.diffusion import Diffusion
from defenses.diffusion import majority, mean_probability
from tests.helpers import hubserver
from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
CPU = torch.device("cpu")
COSINE = {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"}
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


FIVE = {  # levels
    "block_out_channels": (8,) * 5,
    "down_block_types": ("DownBlock2D",) * 5,
    "up_block_types": ("UpBlock2D",) * 5,
}


def unet(**change: Any) -> diffusers.UNet2DModel:
    with globalstate.fixed_rng(7):
        return diffusers.UNet2DModel(**{**SMALL, **change})


def saved(folder: Path, scheduler: Any = None, **change: Any) -> Path:
    """Write a small checkpoint in the flat layout."""
    unet(**change).save_pretrained(folder)
    (scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def build(*settings: str, sigma: float = 0.25) -> Any:
    """Build the untrained defense on the tiny card."""
    (plan,) = make_plans(RunOptions(defenses="diffusion", dataset=TINY, sigma=str(sigma), settings=settings))
    return fitting.construct(plan, untrained_base(plan.card, plan.base, CPU), CPU)


def draw(rows: int, sigma: float = 0.25) -> VoteDraw:
    return VoteDraw(Noise(0, "test"), [Vote("estimate", 0, i) for i in range(rows)], sigma, CPU)


class Exact(nn.Module):
    """Predicts exactly for images whose pixels, in [0, 1], are independent N(mean, std^2)."""

    def __init__(self, kind: str, scheduler: Any, mean: float = 0.5, std: float = 0.1) -> None:
        super().__init__()
        self.kind, self.alphas = kind, scheduler.alphas_cumprod.double()
        self.mean, self.variance = 2 * mean - 1, (2 * std) ** 2
        self.asked: list[int] = []

    def forward(self, noisy: Tensor, t: int) -> Any:
        self.asked.append(t)
        a = self.alphas[t]
        gain = (noisy.double() - a.sqrt() * self.mean) / (a * self.variance + 1 - a)
        clean, noise = self.mean + a.sqrt() * self.variance * gain, (1 - a).sqrt() * gain
        v = a.sqrt() * noise - (1 - a).sqrt() * clean
        out = {"epsilon": noise, "v_prediction": v, "sample": clean}[self.kind]
        # A learned variance in the second half of the channels, which must not be used.
        return SimpleNamespace(sample=torch.cat([out, torch.full_like(out, torch.nan)], 1).float())


@pytest.mark.parametrize(
    ("schedule", "published"),
    [(COSINE, [573, 1158, 1984, 2809]), ({"num_train_timesteps": 1000}, [70, 145, 259, 396])],
    ids=["cifar10", "imagenet"],
)
def test_noise_levels_become_the_published_timesteps(tmp_path: Path, schedule: Any, published: list[int]) -> None:
    made = build(f"unet={saved(tmp_path, diffusers.DDPMScheduler(**schedule))}", "timestep_scale=1")
    made.unet = Exact("epsilon", diffusers.DDPMScheduler(**schedule))
    for sigma in (0.12, 0.25, 0.5, 1.0):
        made.denoised(torch.rand(1, 1, 8, 8), draw(1, sigma))
    assert made.unet.asked == published


@pytest.mark.parametrize(
    ("schedule", "settings", "published"),
    [
        (COSINE, ["timestep_scale=0.25"], [143.25, 289.5, 496, 702.25]),
        ({"num_train_timesteps": 1000}, [], [70, 145, 259, 396]),
    ],
    ids=["cifar10", "imagenet"],
)
def test_the_network_is_asked_at_the_time_of_its_training(
    tmp_path: Path, schedule: Any, settings: list[str], published: list[float]
) -> None:
    """A real UNet gets the times at which improved- and guided-diffusion ask theirs, unrounded: t * 1000 / T."""
    made = build(f"unet={saved(tmp_path, diffusers.DDPMScheduler(**schedule))}", *settings)
    times: list[float] = []
    embedded: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        times.append(float(inputs[0]))
        embedded.append(out)

    made.unet.time_proj.register_forward_hook(hook)
    x = torch.rand(1, 1, 8, 8)
    for sigma in (0.12, 0.25, 0.5, 1.0):
        out = made.denoised(x, draw(1, sigma))
    assert times == published
    # Ho et al.'s sinusoids of the time, of which diffusers has the cosines first.
    angles = torch.outer(torch.tensor(published), 10_000.0 ** (-torch.arange(4) / 4))
    torch.testing.assert_close(torch.cat(embedded), torch.cat([angles.cos(), angles.sin()], 1), atol=1e-4, rtol=0)
    # The noise level is that of the step itself: here the last.
    step = {702.25: 2809, 396: 396}[published[-1]]
    kept = diffusers.DDPMScheduler(**schedule).alphas_cumprod[step].double()
    with torch.no_grad():
        noise = unet()(kept.sqrt().float() * (2 * x - 1), torch.tensor(published[-1])).sample
    clean = (2 * x - 1) - (1 / kept - 1).sqrt().float() * noise
    torch.testing.assert_close(out, (clean.clamp(-1, 1) + 1) / 2, atol=1e-5, rtol=0)


def test_a_scale_is_part_of_the_identity(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json", "--examples", 1)
    folder = saved(tmp_path / "unet", diffusers.DDPMScheduler(**COSINE))
    found = {}
    for scale in (0.25, 1.0):
        ran = bench(*args, "--set", f"unet={folder}", "--set", f"timestep_scale={scale}")
        assert ran.code == 0, ran.err
        (info,) = json.loads(ran.out)
        assert info["identity"]["defense"]["config"]["timestep_scale"] == scale
        found[scale] = info["path"]
    assert len(set(found.values())) == 2


def test_a_schedule_of_other_steps_needs_a_scale(tmp_path: Path) -> None:
    folder = saved(tmp_path, diffusers.DDPMScheduler(**COSINE))
    with pytest.raises(
        BenchError, match=r"has 4000 steps, not 1000; --set timestep_scale=0.25 for weights of impr"
    ) as e:
        build(f"unet={folder}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["0", "-1"])
def test_an_impossible_scale_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(BenchError, match="must be above 0"):
        build(f"unet={saved(tmp_path)}", f"timestep_scale={value}")


def test_a_network_of_another_size_runs_and_is_reported(bench: Bench, tmp_path: Path) -> None:
    """The size in its config changes nothing but the remark, since a UNet's weights do not depend on it."""
    args = ("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json", "--examples", 1)
    counts = []
    for size in (8, 16):
        folder = saved(tmp_path / str(size), sample_size=size)
        ran = bench(*args, "--set", f"unet={folder}")
        assert ran.code == 0, ran.err
        (info,) = json.loads(ran.out)
        note = f"unet={folder} is for 1x{size}x{size} images, the data are 1x8x8: it is used at another size"
        assert (note in ran.err) is (size == 16)
        assert any(note in text for text in info["defense"].get("notes", [])) is (size == 16)
        row = json.loads((Path(info["path"]) / "certificates.jsonl").read_text())
        counts.append([row["top_count"], row["runner_up_count"]])
    assert counts[0] == counts[1]


def test_the_papers_unet_of_256_takes_images_of_224() -> None:
    """Six levels, as ADM 256 unconditional has them, at a fraction of its width: five down-samplings, 224 = 7 * 32."""
    widths = {"block_out_channels": (4, 4, 8, 8, 16, 16), "in_channels": 3, "out_channels": 6}
    blocks = {"down_block_types": ("DownBlock2D",) * 6, "up_block_types": ("UpBlock2D",) * 6}
    net = unet(sample_size=256, **widths, **blocks)
    seen: list[str] = []
    context: Any = SimpleNamespace(shape=(3, 224, 224), note=seen.append)
    unets._check_shape(context, "adm", net)
    assert seen == [
        "diffusion: unet=adm is for 3x256x256 images, the data are 3x224x224: it is used at another size than it was "
        "trained at"
    ]
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 224, 224), 145).sample.shape == (1, 6, 224, 224)
    for side in (225, 240):
        context.shape = (3, side, side)
        with pytest.raises(BenchError, match="its down-samplings need sides that 32 divides"):
            unets._check_shape(context, "adm", net)
        with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            net(torch.zeros(1, 3, side, side), 145)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_an_exact_model_denoises_to_the_posterior_mean(tmp_path: Path, kind: str, schedule: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, prediction_type=kind)
    made = build(f"unet={saved(tmp_path, scheduler, out_channels=2)}")
    made.unet = Exact(kind, scheduler)
    x = 0.5 + 0.27 * torch.randn(16, 1, 8, 8)
    out = made.denoised(x, draw(16))
    # The noise level of the chosen step, slightly above .25.
    level = float(1 / scheduler.alphas_cumprod[made.unet.asked[0]] - 1) ** 0.5 / 2
    assert 0.25 <= level < 0.255
    wanted = 0.5 + 0.1**2 / (0.1**2 + level**2) * (x - 0.5)
    assert wanted.min() > 0 and wanted.max() < 1
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=0)


def test_pixels_come_back_in_their_range(tmp_path: Path) -> None:
    made = build(f"unet={saved(tmp_path)}")

    class Scaled(nn.Module):  # predicts the noisy image itself
        def forward(self, noisy: Tensor, t: int) -> Any:
            return SimpleNamespace(sample=noisy / float(diffusers.DDPMScheduler().alphas_cumprod[t]) ** 0.5)

    made.unet, made.denoising = Scaled(), replace(made.denoising, prediction="sample")
    x = torch.linspace(-1, 2, 64).view(1, 1, 8, 8)
    torch.testing.assert_close(made.denoised(x, draw(1)), x.clamp(0, 1), atol=1e-6, rtol=0)


def test_many_steps_sample_the_posterior_and_belong_to_the_vote(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler()
    made = build(f"unet={saved(tmp_path, scheduler)}", "steps=146")
    made.unet = Exact("epsilon", scheduler)
    x = torch.full((200, 1, 8, 8), 0.8)
    out = made.denoised(x, draw(200))
    assert made.unet.asked == list(range(145, -1, -1))
    level = float(1 / scheduler.alphas_cumprod[145] - 1) ** 0.5 / 2
    shrink = 0.1**2 / (0.1**2 + level**2)
    # 12,800 pixels: five standard errors of the mean; the chain's own error in its spread is a few percent.
    assert abs(float(out.mean()) - (0.5 + shrink * 0.3)) < 5 * 0.1 / 12_800**0.5
    assert float(out.std()) == pytest.approx(0.1 * (1 - shrink) ** 0.5, rel=0.05)
    part = VoteDraw(Noise(0, "test"), [Vote("estimate", 0, i) for i in (5, 3)], 0.25, CPU)
    assert torch.equal(made.denoised(x[:2], part), out[[5, 3]])


@pytest.mark.parametrize(
    "settings",
    [
        ("steps=3",),
        ("classifier=lora", "steps=2"),
        ("steps=2", "reverse_runs=3"),
        ("local_copies=3", "local_sigma=.1"),
        ("steps=2", "reverse_runs=2", "local_copies=2", "local_sigma=.1", "local_vote=majority", "classifier=lora"),
    ],
)
def test_variants_conform(settings: tuple[str, ...]) -> None:
    (plan,) = make_plans(RunOptions(defenses="diffusion", dataset=TINY, settings=settings))
    found = list(examine(plan))
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub whose someone/ddpm is the flat checkpoint and someone/pipeline the same as a pipeline."""
    flat, nested = saved(tmp_path / "flat"), tmp_path / "nested"
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(nested)
    files = {
        ("model", repo, str(f.relative_to(root))): f.read_bytes()
        for repo, root in (("someone/ddpm", flat), ("someone/pipeline", nested))
        for f in root.rglob("*.*")
        if f.is_file()
    }
    with hubserver.HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


def test_an_external_checkpoint_is_loaded_and_reported(bench: Bench, tmp_path: Path, hub: Any) -> None:
    votes = []
    for source in (str(tmp_path / "flat"), str(tmp_path / "nested"), "someone/ddpm", f"someone/ddpm@{'a' * 40}"):
        ran = bench(
            *("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--json"),
            *("--examples", 2, "--set", f"unet={source}"),
        )
        assert ran.code == 0, ran.err
        (info,) = json.loads(ran.out)
        assert info["cost"]["trained_elsewhere"] == sum(p.numel() for p in unet().parameters())
        assert info["cost"]["trained_here"] == info["cost"]["train_seconds"] == 0
        assert info["defense"]["trained_elsewhere"] == [source]
        commit = {"someone/ddpm": hubserver.COMMIT, f"someone/ddpm@{'a' * 40}": "a" * 40}.get(source)
        assert info["defense"]["commits"] == ({source: commit} if commit else {})
        assert info["defense"]["access"] == "QUERY"
        weights = "unet/" * ("nested" in source) + "diffusion_pytorch_model.safetensors"
        file = (tmp_path / "nested" if "nested" in source else tmp_path / "flat") / weights
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        assert info["identity"]["defense"]["parts"][f"{weights} {sha256[:8]}"] == sha256
        rows = (Path(info["path"]) / "certificates.jsonl").read_text().splitlines()
        votes.append([{**json.loads(row), "seconds": 0} for row in rows])
    assert all(v == votes[0] for v in votes)
    made = build("unet=someone/pipeline")
    for key, value in unet().state_dict().items():
        assert torch.equal(made.unet.state_dict()[key], value), key


def test_a_cached_checkpoint_needs_no_network(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {source: build(f"unet={source}").unet.state_dict() for source in ("someone/ddpm", "someone/pipeline")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, state in before.items():
        again = build(f"unet={source}").unet.state_dict()
        assert all(torch.equal(again[k], v) for k, v in state.items())
    with pytest.raises(BenchError, match=r"no copy of config.json of hub model 'someone/other' and no network"):
        build("unet=someone/other")


def test_attention_layers_under_their_old_names(tmp_path: Path) -> None:
    file = saved(tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    assert not any("to_" in k for k in state)
    save_file(state, file)
    made = build(f"unet={tmp_path}")
    assert all(torch.equal(made.unet.state_dict()[k], v) for k, v in unet().state_dict().items())


@pytest.mark.parametrize("layout", [{"max_shard_size": "5KB"}, {"variant": "fp16"}])
def test_shards_and_rounded_variants_are_read(tmp_path: Path, layout: dict[str, str]) -> None:
    whole = build(f"unet={saved(tmp_path / 'whole')}").unet.state_dict()
    torch.manual_seed(0)
    other = saved(tmp_path / "other")
    (other / "diffusion_pytorch_model.safetensors").unlink()
    model = unet()
    model.load_state_dict(whole)
    model.save_pretrained(other, **layout)
    assert not (other / "diffusion_pytorch_model.safetensors").exists()
    found = build(f"unet={other}").unet.state_dict()
    for key, value in whole.items():
        assert torch.allclose(found[key], value, atol=1e-3 if "variant" in layout else 0), key


def test_a_variant_that_may_hold_other_weights_is_named(tmp_path: Path) -> None:
    unet().save_pretrained(saved(tmp_path), variant="non_ema")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BenchError, match=r"it has diffusion_pytorch_model.non_ema.safetensors: save the right one"):
        build(f"unet={tmp_path}")


def pickled(folder: Path) -> None:
    unet().save_pretrained(saved(folder), safe_serialization=False)
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def no_json(folder: Path) -> None:
    (saved(folder) / "config.json").write_text("<html>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: saved(f, sample_size=40), "1x40x40 images, the data are 1x8x8, a size more than 4 times another"),
        (lambda f: saved(f, sample_size=16, **FIVE), "its down-samplings need sides that 16 divides"),
        (lambda f: saved(f, in_channels=3, out_channels=3), "is for 3x8x8 images, the data are 1x8x8"),
        (lambda f: saved(f, num_class_embeds=10), "give an unconditional UNet2DModel"),
        (lambda f: saved(f, diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler"),
        (lambda f: saved(f, diffusers.EDMEulerScheduler()), "EDMEulerScheduler .* or CMStochasticIterativeScheduler"),
        (pickled, r"a pickled \.bin is refused"),
        (no_json, "config.json is not JSON"),
        (lambda f: unet().save_pretrained(f), "neither scheduler_config.json nor scheduler/scheduler_config.json"),
        (lambda f: (saved(f), unet(block_out_channels=(8, 16)).save_config(f)), "does not fit its config.json"),
    ],
    ids=[
        "resolution",
        "down-samplings",
        "channels",
        "labels",
        "scheduler",
        "scheduler of sigmas",
        "pickle",
        "json",
        "no scheduler",
        "weights",
    ],
)
def test_checkpoints_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path)
    with pytest.raises(BenchError, match=message) as e:
        build(f"unet={tmp_path}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["steps=0"], "steps=0: must be 1 to"),
        (["steps=4000"], "steps=4000: must be 1 to"),
        (["width=12"], "width=12 must be a multiple of 8"),
        (["steps=2", "reverse_runs=0"], "reverse_runs=0 must be at least 1"),
        (["reverse_runs=2"], "runs of one step are all equal; set steps above 1"),
        (["local_copies=5"], "local_copies=5 and local_sigma=0: local smoothing needs both above 0"),
        (["local_sigma=.1"], "local smoothing needs both above 0"),
        (["local_copies=-1", "local_sigma=.1"], "local smoothing needs both above 0"),
        (["local_copies=2", "local_sigma=-.1"], "local smoothing needs both above 0"),
        (["local_vote=majority"], "there is no local smoothing; set local_copies"),
        (["timestep_scale=0.25"], "leave it out for one trained here"),
        ([f"classifier={defense('own_loss')}"], "has its own training"),
        (["classifier=nobody"], "nobody"),
    ],
)
def test_invalid_settings_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message) as e:
        build(*settings)
    assert "\n" not in str(e.value)


def test_noise_beyond_the_schedule_is_refused_in_training_and_certification(bench: Bench, tmp_path: Path) -> None:
    # The last step keeps .9^3 of the image: noise of .305.
    unet_ = f"unet={saved(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1] * 3))}"
    build(unet_, "timestep_scale=1", sigma=0.3)
    with pytest.raises(BenchError, match=r"sigma 0.31 is above the schedule's last step, 0.305"):
        build(unet_, "timestep_scale=1", sigma=0.31)
    args = ("run", "--defense", "diffusion", "--dataset", TINY, "--out", tmp_path / "runs", "--set", unet_)
    ran = bench(*args, "--set", "timestep_scale=1", "--sigma", 0.5, "--train-sigma", 0.25)
    assert (ran.code, ran.err.splitlines()[-1].count("sigma 0.5 is above the schedule's last step")) == (2, 1)


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


def test_it_is_listed_without_being_imported() -> None:
    # In a process of its own: this one has imported diffusers.
    code = "import sys; from bench.cli import main; sys.modules['diffusers'] = None; main(['list', '--json'])"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["diffusion"] | {"summary": ""} == {
        "name": "diffusion",
        "summary": "",
        "family": "diffusion",
        "trains": "training-free",
        "access": "QUERY",
        "paper": "2206.10550",
        "where": "built in",
    }
