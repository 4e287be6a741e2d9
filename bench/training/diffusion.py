"""A small diffusion model for defenses that have no pretrained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bench.interface import Draw, Job, Part, Schedule

VERSION = 1  # raise it whenever weights trained here would change: it is part of their identity
# Any, since diffusers' decorators hide its types.
UNET: Any = diffusers.UNet2DModel
DDPM: Any = diffusers.DDPMScheduler


class Averaged(nn.Module):
    """A network with a moving average of its weights, stored in checkpoints too."""

    ema: Tensor
    updates: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("ema", parameters_to_vector(net.parameters()).detach().clone())
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average towards the weights, faster in early steps, so that initial weights have no effect."""
        done = int(self.updates)
        self.ema.lerp_(parameters_to_vector(self.net.parameters()), 1 - min(decay, (1 + done) / (10 + done)))
        self.updates += 1

    def adopt(self) -> None:
        """Replace the weights by their average."""
        vector_to_parameters(self.ema.clone(), self.net.parameters())


@dataclass(frozen=True)
class Diffusion(Part):
    """A small UNet without attention, trained as in Ho et al. 2020 (arXiv 2006.11239).

    The loss is the squared error of the predicted noise at a random step for each image; averaged weights are used. The
    schedule is the cosine of Nichol and Dhariwal 2021 (arXiv 2102.09672).
    """

    width: int
    schedule: Schedule
    layers: int = 1
    timesteps: int = 1000
    ema: float = 0.995

    def scheduler(self) -> Any:
        """Return the noise schedule."""
        return DDPM(num_train_timesteps=self.timesteps, beta_schedule="squaredcos_cap_v2")

    def build(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        channels, *size = shape
        widths = [self.width]
        while len(widths) < 6 and min(size) > 7 and not any(side % 2 for side in size):
            size = [side // 2 for side in size]  # down to 4x4 where the size allows it
            widths.append(min(2 * widths[-1], 4 * self.width))
        net = UNET(
            sample_size=shape[1:],
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            layers_per_block=self.layers,
            down_block_types=["DownBlock2D"] * len(widths),
            up_block_types=["UpBlock2D"] * len(widths),
            norm_num_groups=8,
            add_attention=False,
        )
        return Averaged(net)

    def fit(self, module: nn.Module, job: Job) -> None:
        averaged = cast(Averaged, module)
        alphas = self.scheduler().alphas_cumprod

        def loss(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
            # Before the optimizer's step, so that a checkpoint's average and weights are of the same step.
            averaged.follow(self.ema)
            t = torch.randint(0, self.timesteps, (len(x),))
            kept = alphas[t].to(x.device).view(-1, 1, 1, 1)
            noise = draw.normal(*x.shape[1:])
            noisy = kept.sqrt() * (2 * x - 1) + (1 - kept).sqrt() * noise
            return F.mse_loss(averaged.net(noisy, t.to(x.device)).sample, noise)

        job.train(module, loss, self.schedule)
        averaged.follow(self.ema)
        averaged.adopt()
