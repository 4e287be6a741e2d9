"""How a UNet removes Gaussian noise from pixels: the sampling of diffusion models, and consistency models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Draw

VERSION = 1  # raise it whenever denoised images would change: classifiers are trained on them
CONSISTENCY = "CMStochasticIterativeScheduler"  # of diffusers' ConsistencyModelPipeline
STEPS = 1000  # of a schedule whose network is asked at the step itself
# The networks see pixels of [0, 1] scaled to [-1, 1], which doubles the noise.
SCALE = 2


class Denoising(ABC):
    """A fixed way to denoise pixels with a UNet; it holds no weights."""

    randomised = False  # whether it draws noise of its own

    @abstractmethod
    def check(self, sigma: float) -> None:
        """Raise BenchError where it cannot denoise this noise level."""

    @abstractmethod
    def denoise(self, unet: nn.Module, x: Tensor, draw: Draw) -> Tensor:
        """Denoise pixels [B, C, H, W] whose noise has level ``draw.sigma``; return pixels in [0, 1]."""


@dataclass(frozen=True)
class Sampling(Denoising):
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239) in evenly spaced ``steps``; one step is deterministic.

    One step is that of Carlini et al. 2022 (arXiv 2206.10550): the noise of the certified input is the diffusion's.
    """

    alphas: tuple[float, ...]  # of each step: the share of the image's variance that is kept
    prediction: str  # of the network: epsilon, v_prediction or sample
    scale: float  # the network is asked at the step times this
    steps: int

    @property
    def randomised(self) -> bool:  # type: ignore[override]
        return self.steps > 1

    def times(self, sigma: float) -> list[int]:
        """Return the steps at which the UNet is evaluated, counted from 0.

        The first is the lowest whose noise relative to the image is at least 2 sigma.
        """
        first = next((t for t, kept in enumerate(self.alphas) if kept <= 1 / (1 + (SCALE * sigma) ** 2)), None)
        if first is None:
            most = (1 / self.alphas[-1] - 1) ** 0.5 / SCALE
            raise BenchError(f"diffusion: sigma {sigma:g} is above the schedule's last step, {most:.3g}; lower --sigma")
        steps = self.steps
        if not 1 <= steps <= first + 1:
            raise BenchError(f"diffusion: steps={steps}: must be 1 to {first + 1} for sigma {sigma:g}")
        # Step -1 would be the clean image, so that steps = first + 1 visits every step.
        return [first - i * (first + 1) // steps for i in range(steps)]

    def check(self, sigma: float) -> None:
        self.times(sigma)

    def predict(self, unet: nn.Module, noisy: Tensor, t: int) -> Tensor:
        """Predict the clean image, in [-1, 1], from the noisy image of step ``t``."""
        kept = self.alphas[t]
        # As a tensor, since diffusers truncates a Python number to an integer.
        asked = t if self.scale == 1 else noisy.new_tensor(t * self.scale)
        out: Tensor = unet(noisy, asked).sample[:, : noisy.shape[1]]  # the rest is a learned variance
        if self.prediction == "epsilon":
            out = noisy / kept**0.5 - (1 / kept - 1) ** 0.5 * out
        elif self.prediction == "v_prediction":
            out = kept**0.5 * noisy - (1 - kept) ** 0.5 * out
        return out.clamp(-1, 1)

    def denoise(self, unet: nn.Module, x: Tensor, draw: Draw) -> Tensor:
        times = self.times(draw.sigma)
        noisy = self.alphas[times[0]] ** 0.5 * (2 * x - 1)
        clean = self.predict(unet, noisy, times[0])
        for t, after in pairwise(times):
            # q(x_after | x_t, x_0) of the chain with only these steps.
            kept, more = self.alphas[t], self.alphas[after]
            spread = 1 - kept / more
            mean = (more**0.5 * spread * clean + (kept / more) ** 0.5 * (1 - more) * noisy) / (1 - kept)
            noisy = mean + (spread * (1 - more) / (1 - kept)) ** 0.5 * draw.normal(*x.shape[1:])
            clean = self.predict(unet, noisy, after)
        return (clean + 1) / 2


@dataclass(frozen=True)
class Consistency(Denoising):
    """One evaluation of a consistency model (Song et al. 2023, arXiv 2303.01469), as diffusers computes it.

    Its noise levels are continuous, so it denoises exactly the level of the certified input, as in consistency
    purification (Li et al. 2024, arXiv 2407.00623).
    """

    sigma_min: float  # in pixels of [-1, 1], as the next two
    sigma_max: float
    sigma_data: float

    def check(self, sigma: float) -> None:
        low, high = self.sigma_min / SCALE, self.sigma_max / SCALE
        if not low < sigma <= high:
            raise BenchError(
                f"diffusion: sigma {sigma:g} is not a noise level of this consistency model, {low:g} to {high:g}; "
                f"change --sigma"
            )

    def denoise(self, unet: nn.Module, x: Tensor, draw: Draw) -> Tensor:
        self.check(draw.sigma)
        level, data = SCALE * draw.sigma, self.sigma_data
        noisy, total = 2 * x - 1, math.hypot(level, data)
        asked = noisy.new_tensor(250 * math.log(level))
        out: Tensor = unet(noisy / total, asked).sample[:, : noisy.shape[1]]
        above = level - self.sigma_min
        clean = above * data / total * out + data**2 / (above**2 + data**2) * noisy
        return (clean.clamp(-1, 1) + 1) / 2


def denoising(scheduler: Any, unet: str, steps: int, timestep_scale: float | None) -> Denoising:
    """Return how the UNet of a diffusers scheduler denoises.

    Args:
        scheduler: Of diffusers: one with ``alphas_cumprod``, or that of consistency models.
        unet: Where the network is from; empty for one trained here.
        steps: Evaluations of the network.
        timestep_scale: By which its steps are multiplied; None: 1.

    Raises:
        BenchError: A setting is invalid or does not fit the scheduler.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if steps != 1 and kind in (CONSISTENCY, "LCMScheduler"):
        raise BenchError(f"diffusion: steps={steps}: unet={unet} is a consistency model ({kind}), which takes 1 step")
    if kind == CONSISTENCY:
        if timestep_scale is not None:
            raise BenchError(f"diffusion: timestep_scale: unet={unet} is a consistency model, asked at its noise level")
        return Consistency(config.sigma_min, config.sigma_max, config.sigma_data)
    alphas = tuple(scheduler.alphas_cumprod.double().tolist())
    return Sampling(alphas, config.prediction_type, _scale(len(alphas), unet, timestep_scale), steps)


def _scale(count: int, unet: str, given: float | None) -> float:
    """Return what a network's steps are multiplied by, of ``count`` steps."""
    if not unet and given is not None:
        raise BenchError("diffusion: timestep_scale is of a network in unet; leave it out for one trained here")
    if given is None and count != STEPS:
        raise BenchError(
            f"diffusion: unet={unet} has {count} steps, not {STEPS}; --set timestep_scale={STEPS / count:.10g} for "
            f"weights of improved- or guided-diffusion, --set timestep_scale=1 for one trained with diffusers"
        )
    scale = 1.0 if given is None else given
    if not 0 < scale < math.inf:
        raise BenchError(f"diffusion: timestep_scale={scale:g} must be above 0; use {STEPS / count:.10g} or 1")
    return scale
