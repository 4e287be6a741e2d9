"""Small UNets, and diffusion defenses built with them; a model that denoises exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from bench import globalstate
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.runs import fitting
from bench.runs.plan import make_plans
from bench.smoothing.noise import Noise, Vote, VoteDraw
from tests.helpers.commands import TINY

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
