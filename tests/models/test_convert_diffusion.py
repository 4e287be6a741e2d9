"""Checkpoints of improved- and guided-diffusion, converted to diffusers and compared with a forward written here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.errors import BenchError
from bench.models.convert import Stated, convert
from bench.models.convert_diffusion import _unet
from bench.models.diffusion_flags import published
from bench.models.unets import load
from tests.helpers.commands import Bench

UNET: Any = diffusers.UNet2DModel
DDPM: Any = diffusers.DDPMScheduler

# As published with improved-diffusion's CIFAR-10 models and guided-diffusion's unconditional model of 256x256.
IMPROVED_CIFAR10 = (
    "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
    "--diffusion_steps 4000 --noise_schedule cosine"
)
GUIDED_256 = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 --learn_sigma True "
    "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
    "--use_fp16 True --use_scale_shift_norm True"
)


@dataclass
class Released:
    """The released UNet: its forward pass makes each tensor at random when it first needs it."""

    channels: int = 32
    mult: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (2,)  # down-samplings
    heads: int = 4  # of every attention; 0: heads of 16 channels
    out: int = 6
    resnet_sampling: bool = False
    scale_shift: bool = True
    new_order: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, *shape: int, around: float = 0.0) -> Tensor:
        if name not in self.state:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 16
            self.state[name] = around + torch.randn(shape) / fan_in**0.5
        assert self.state[name].shape == shape
        return self.state[name]

    def conv(self, name: str, x: Tensor, out: int, side: int = 3, stride: int = 1) -> Tensor:
        weight = self.tensor(f"{name}.weight", out, x.shape[1], side, side)
        return F.conv2d(x, weight, self.tensor(f"{name}.bias", out), stride, side // 2)

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return F.linear(x, self.tensor(f"{name}.weight", out, x.shape[1]), self.tensor(f"{name}.bias", out))

    def norm(self, name: str, x: Tensor) -> Tensor:
        count = x.shape[1]
        return F.group_norm(
            x, 32, self.tensor(f"{name}.weight", count, around=1.0), self.tensor(f"{name}.bias", count), 1e-5
        )

    def block(
        self, name: str, x: Tensor, emb: Tensor, out: int, sample: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if sample is not None:
            h, x = sample(h), sample(x)
        h = self.conv(f"{name}.in_layers.2", h, out)
        time = self.linear(f"{name}.emb_layers.1", F.silu(emb), out * (1 + self.scale_shift))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time[:, :out], time[:, out:]
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + time)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.skip_connection", x, out, 1))

    def attend(self, name: str, x: Tensor) -> Tensor:
        rows, width, high, wide = x.shape
        flat = self.norm(f"{name}.norm", x).flatten(2)
        weight, bias = (
            self.tensor(f"{name}.qkv.weight", 3 * width, width, 1),
            self.tensor(f"{name}.qkv.bias", 3 * width),
        )
        qkv = F.conv1d(flat, weight, bias)
        heads = self.heads or width // 16
        each, result = width // heads, []
        for h in range(heads):
            # The channels of a head's q, k and v: one after another, or apart in thirds of all channels.
            starts = (
                [i * width + h * each for i in range(3)] if self.new_order else [(3 * h + i) * each for i in range(3)]
            )
            q, k, v = (qkv[:, s : s + each] for s in starts)
            weights = torch.softmax(q.transpose(1, 2) @ k / each**0.5, -1)  # [rows, to, from]
            result.append(v @ weights.transpose(1, 2))
        out = self.tensor(f"{name}.proj_out.weight", width, width, 1), self.tensor(f"{name}.proj_out.bias", width)
        return x + F.conv1d(torch.cat(result, 1), *out).view(rows, width, high, wide)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.channels // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        emb = self.linear("time_embed.0", emb, 4 * self.channels)
        emb = self.linear("time_embed.2", F.silu(emb), 4 * self.channels)
        down, number, shrunk = [self.conv("input_blocks.0.0", x, self.channels)], 1, 1
        h = down[0]
        for level, m in enumerate(self.mult):
            for _ in range(self.blocks):
                h = self.block(f"input_blocks.{number}.0", h, emb, m * self.channels)
                h = self.attend(f"input_blocks.{number}.1", h) if shrunk in self.attention else h
                down.append(h)
                number += 1
            if level < len(self.mult) - 1:
                name = f"input_blocks.{number}.0"
                if self.resnet_sampling:
                    h = self.block(name, h, emb, h.shape[1], lambda z: F.avg_pool2d(z, 2))
                else:
                    h = self.conv(f"{name}.op", h, h.shape[1], 3, 2)
                down.append(h)
                number, shrunk = number + 1, 2 * shrunk
        h = self.block("middle_block.0", h, emb, h.shape[1])
        h = self.block("middle_block.2", self.attend("middle_block.1", h), emb, h.shape[1])
        number = 0
        for level, m in reversed(list(enumerate(self.mult))):
            for i in range(self.blocks + 1):
                name, after = f"output_blocks.{number}", 1
                h = self.block(f"{name}.0", torch.cat([h, down.pop()], 1), emb, m * self.channels)
                if shrunk in self.attention:
                    h, after = self.attend(f"{name}.1", h), 2
                if level and i == self.blocks:
                    if self.resnet_sampling:
                        h = self.block(
                            f"{name}.{after}", h, emb, h.shape[1], lambda z: F.interpolate(z, scale_factor=2)
                        )
                    else:
                        h = self.conv(f"{name}.{after}.conv", F.interpolate(h, scale_factor=2), h.shape[1])
                    shrunk //= 2
                number += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), self.out)


SMALL = "--image_size 16 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 8"
CASES = {
    "improved": (
        Released(),
        SMALL
        + " --num_heads 4 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True",
    ),
    "guided": (
        Released(heads=0, resnet_sampling=True, blocks=2, attention=(1, 2)),
        SMALL.replace("blocks 1", "blocks 2").replace("resolutions 8", "resolutions 16,8") + " --num_head_channels 16 "
        "--resblock_updown True --learn_sigma True --diffusion_steps 1000 --noise_schedule linear",
    ),
    "guided, no attention above the middle": (
        Released(mult=(1, 2, 2), attention=(), new_order=True, resnet_sampling=True),
        "--image_size=16 --num_channels=32 --channel_mult=1,2,2 --num_res_blocks=1 --attention_resolutions=1 "
        "--use_new_attention_order=True --resblock_updown=True --learn_sigma=True --diffusion_steps=1000 "
        "--noise_schedule=cosine",
    ),
    "fixed variance": (
        Released(out=3, scale_shift=False, new_order=True),
        SMALL + " --use_scale_shift_norm False --use_new_attention_order True --diffusion_steps 1000 "
        "--noise_schedule linear",
    ),
}


def checkpoint(net: Released, path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net(torch.randn(1, 3, 16, 16), torch.tensor([1.0]))
        torch.save(net.state, path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_released_network(case: str, bench: Bench, tmp_path: Path) -> None:
    net, flags = CASES[case]
    file, out = checkpoint(net, tmp_path / "model.pt"), tmp_path / "unet"
    ran = bench("convert", file, "--to", out, "--flags", flags)
    assert ran.code == 0, ran.err
    model = UNET.from_pretrained(out)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([289.5, 7.0])
    with torch.no_grad():
        wanted, got = net(x, t), model(x, t).sample
    assert wanted.shape == (2, net.out, 16, 16)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert ("learned variance" in ran.out) == (net.out == 6)
    assert ("--set timestep_scale=0.25" in ran.out) == (case == "improved")
    context = SimpleNamespace(shape=(3, 16, 16), hub=lambda source, name: Path(source) / name, note=print)
    unet, scheduler = load(cast(Any, context), str(out))
    with torch.no_grad():
        assert torch.equal(unet(x, t).sample, got)
    assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("schedule", "steps", "first"),
    # The steps of sigma .12, .25, .5 and 1 in the released code of Carlini et al., counted from 0.
    [("cosine", 4000, (573, 1158, 1984, 2809)), ("linear", 1000, (70, 145, 259, 396))],
)
def test_schedules_give_the_published_timesteps(
    schedule: str, steps: int, first: tuple[int, ...], tmp_path: Path
) -> None:
    flags = f"{SMALL} --num_heads 4 --learn_sigma True --rescale_timesteps True"
    file = checkpoint(Released(), tmp_path / "model.pt")
    convert(file, tmp_path / "unet", Stated(flags=f"{flags} --diffusion_steps {steps} --noise_schedule {schedule}"))
    alphas = DDPM.from_pretrained(tmp_path / "unet").alphas_cumprod.double()
    for sigma, expected in zip((0.12, 0.25, 0.5, 1.0), first, strict=True):
        reached = ((1 - alphas) / alphas).sqrt() >= 2 * sigma
        assert int(reached.int().argmax()) == expected


@pytest.mark.parametrize(("flags", "count"), [(IMPROVED_CIFAR10, 52_546_438), (GUIDED_256, 552_814_086)])
def test_published_flags_describe_the_published_networks(flags: str, count: int) -> None:
    found = published(Path("model.pt"), flags)
    with torch.device("meta"):
        model = UNET.from_config(_unet(found.net))
    assert sum(p.numel() for p in model.parameters()) == count
    assert found.net.head == 64
    assert (found.steps, found.schedule, found.scale) in ((4000, "cosine", 0.25), (1000, "linear", 1.0))


# Refusals --------------------------------------------------------------------------------------------

STEPS = " --diffusion_steps 1000 --noise_schedule linear"
RIGHT = f"{SMALL} --num_heads 4 --learn_sigma True{STEPS}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "does not tell its image_size, diffusion_steps, noise_schedule; give"),
        (SMALL, "does not tell its diffusion_steps, noise_schedule"),
        (RIGHT.replace("1,2", "1,1"), "does not fit its --flags: "),
        (RIGHT.replace("1,2", "1,2,2"), "does not fit its --flags: "),
        (RIGHT.replace("blocks 1", "blocks 2"), "does not fit its --flags: "),
        (RIGHT.replace("resolutions 8", "resolutions 16,8"), "4 heads of different sizes (8, 16 channels)"),
        (
            RIGHT.replace("n_resolutions 8", "n_resolutions 16,8 --num_head_channels 16"),
            "no attention with its heads at",
        ),
        (RIGHT.replace("resolutions 8", "resolutions 4"), "they describe no input_blocks.3.1.norm, which the file has"),
        (RIGHT.replace("sigma True", "sigma False"), "conv_out.weight has shape [6, 32, 3, 3], the model's has [3,"),
        (RIGHT + " --use_scale_shift_norm False", "time_emb_proj"),
        (RIGHT + " --resblock_updown True", "input_blocks.2.0.op"),
        (RIGHT + " --class_cond True", "class_cond True cannot be converted"),
        (RIGHT + " --batch_size 4", "model or diffusion flag 'batch_size'"),
        (RIGHT + " --noise_schedule sqrt", "noise_schedule in --flags 'sqrt'"),
        (RIGHT + " --num_heads 0", "num_heads '0': must be a whole number above 0"),
        (RIGHT + " --num_head_channels 24", "no attention with its heads"),
        (RIGHT + " --num_heads_upsample 2", "num_heads_upsample differs"),
        (RIGHT + " --timestep_respacing 250", "timestep_respacing is for sampling"),
        (RIGHT.replace("steps 1000", "steps 4000"), "state --rescale_timesteps True or False"),
        (RIGHT + " --learn_sigma", "write each as --name value"),
        (RIGHT + " --learn_sigma perhaps", "must be True or False"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags: str, words: str, tmp_path: Path) -> None:
    file = checkpoint(Released(), tmp_path / "model.pt")
    with pytest.raises(BenchError) as e:
        convert(file, tmp_path / "unet", Stated(flags=flags))
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "unet").exists()


def test_heads_of_several_sizes_are_refused() -> None:
    flags = "--image_size 64 --num_channels 128 --num_res_blocks 3 --diffusion_steps 4000 --noise_schedule cosine"
    with pytest.raises(BenchError, match=r"4 heads of different sizes \(96, 128 channels\)"):
        published(Path("imagenet64_uncond.pt"), flags)


def test_class_conditional_models_are_refused(tmp_path: Path) -> None:
    net = Released()
    checkpoint(net, tmp_path / "model.pt")
    torch.save({**net.state, "label_emb.weight": torch.rand(10, 128)}, tmp_path / "model.pt")
    with pytest.raises(BenchError, match=r"label_emb\.weight: a class-conditional"):
        convert(tmp_path / "model.pt", tmp_path / "unet", Stated(flags=RIGHT))


def test_timesteps_that_are_not_rescaled_stay(tmp_path: Path) -> None:
    file = checkpoint(Released(), tmp_path / "model.pt")
    flags = RIGHT.replace("steps 1000", "steps 4000") + " --rescale_timesteps False"
    lines = convert(file, tmp_path / "unet", Stated(flags=flags))
    assert "timesteps: as they are" in lines
    assert json.loads((tmp_path / "unet" / "scheduler_config.json").read_text())["num_train_timesteps"] == 4000
