"""Diffusion denoising: its arithmetic compared with closed forms."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from bench.errors import BenchError
from bench.models import unets
from bench.options import RunOptions
from bench.runs.doctor import examine
from bench.runs.plan import make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from tests.helpers.commands import TINY, Bench
from tests.helpers.diffusion_models import COSINE, CPU, Exact, build, draw, saved, unet


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
