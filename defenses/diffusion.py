"""Denoise with a diffusion model in front of the frozen base."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.errors import BenchError
from bench.interface import Access, Defense, Draw, Schedule
from bench.models.unets import load
from bench.training.denoising import denoising
from bench.training.diffusion import Averaged, Diffusion


class DiffusionDenoised(Defense):
    """One-shot diffusion denoising (Carlini et al. 2022, arXiv 2206.10550).

    The noise of the certified input is used as the diffusion's noise: its level determines the step, one prediction
    gives the clean image, and the classifier sees that. The released code adds noise to the clean image itself, at the
    level of the step; here the noise has exactly sigma, slightly less. Of a model with learned variance only the mean
    is used. The base resizes denoised images by its own interpolation; the paper's resize bicubically. ``unet`` is a
    diffusers UNet, a hub id or a folder; if empty, a small one is trained here. A network of another image size is
    used where its down-samplings divide the images' sides, as the paper uses ADM 256 on 224x224. ``paper`` uses the
    public CIFAR-10 weights in diffusers' format (Ho et al., linear, 1,000 steps); the paper's own are Nichol and
    Dhariwal's (cosine, 4,000 steps). A consistency model (scheduler ``CMStochasticIterativeScheduler``) denoises in one
    step too.

    ``timestep_scale`` is what a network's steps are multiplied by. Improved- and guided-diffusion (Nichol and Dhariwal)
    ask a network of T steps at t * 1000 / T, so give 1000 / T for their weights, and 1 for a network that was trained
    with the step itself, as diffusers does. It must be given where the scheduler does not have 1,000 steps.

    ``steps`` above 1 denoises in that many evenly spaced steps of ancestral sampling (Ho et al. 2020), whose randomness
    belongs to the vote. ``classifier`` names a defense trained behind the denoiser in place of the base, with its own
    schedule; the schedule set here is that of the diffusion model.

    Two methods classify several versions of one noisy image for one vote, all drawn by the vote's own key:

    - ``reverse_runs`` K (DensePure, Xiao et al. 2022, arXiv 2211.00322): K runs of ``steps`` above 1, each with its own
      randomness; the class of most runs is the vote.
    - ``local_copies`` m and ``local_sigma`` (local smoothing of DiffSmooth, Zhang et al. 2023, arXiv 2308.14333): m
      copies of the denoised image with noise of ``local_sigma``, in pixels of [0, 1]. ``local_vote`` takes the mean of
      their probabilities (``mean``, as released) or the class of most copies (``majority``).

    A tie of a majority goes to the class of the higher mean probability, then to the first class. A classifier is
    trained on one run and one local copy of each noisy image.
    """

    access = Access.QUERY
    family = "diffusion"
    trains = "training-free"
    paper = "2206.10550"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Checkpoint, denoising, classifier; width and schedule of a model trained here."""

        unet: str = ""
        timestep_scale: float | None = None  # None: 1, for a scheduler of 1,000 steps
        steps: int = 1
        classifier: str = ""
        reverse_runs: int = 1
        local_copies: int = 0  # 0: the denoised image itself
        local_sigma: float = 0.0
        local_vote: Literal["mean", "majority"] = "mean"
        width: int = 16
        epochs: float = 80
        batch: int = 64
        lr: float = 4e-3
        weight_decay: float = 0.0
        warmup: float = 0.1

    presets: ClassVar = {"paper": {"unet": "google/ddpm-cifar10-32"}}

    @classmethod
    def kind(cls, config: Any) -> str:
        return "classifier-tuned" if config.classifier else cls.trains if config.unet else "denoiser-trained"

    @classmethod
    def needs(cls, config: Any) -> Access:
        return Access.WEIGHTS if config.classifier else Access.QUERY

    def build(self) -> None:
        config = self.config
        schedule = Schedule(**{f.name: getattr(config, f.name) for f in fields(Schedule)})
        part = Diffusion(config.width, schedule)
        unet, scheduler = load(self.context, config.unet) if config.unet else (None, part.scheduler())
        self.denoising = denoising(scheduler, config.unet, config.steps, config.timestep_scale)
        self.denoising.check(self.context.train_sigma)  # raises before anything is trained
        self._check_draws()
        if config.width < 8 or config.width % 8:
            raise BenchError(f"diffusion: width={config.width} must be a multiple of 8")
        self.unet = cast(Averaged, self.context.once(part)).net if unet is None else unet
        self.classifier = self.context.inner(config.classifier) if config.classifier else None
        inner = type(self.classifier or self)
        if inner.fit is not Defense.fit or inner.loss is not Defense.loss:
            raise BenchError(f"diffusion: classifier={config.classifier} has its own training; use full or lora")

    def _check_draws(self) -> None:
        config = self.config
        runs, copies, sigma = config.reverse_runs, config.local_copies, config.local_sigma
        if runs < 1:
            raise BenchError(f"diffusion: reverse_runs={runs} must be at least 1")
        if runs > 1 and not self.denoising.randomised:
            raise BenchError(f"diffusion: reverse_runs={runs}: runs of one step are all equal; set steps above 1")
        if copies < 0 or (copies == 0) != (sigma == 0) or sigma < 0:
            raise BenchError(
                f"diffusion: local_copies={copies} and local_sigma={sigma:g}: local smoothing needs both above 0, "
                f"such as 5 and .25; leave both out for none"
            )
        if config.local_vote == "majority" and not copies:
            raise BenchError("diffusion: local_vote=majority: there is no local smoothing; set local_copies")

    def denoised(self, x: Tensor, draw: Draw) -> Tensor:
        """Denoise noisy pixels [B, C, H, W]; return pixels in [0, 1]."""
        return self.denoising.denoise(self.unet, x, draw)

    def schedule(self) -> Schedule:
        return super().schedule() if self.classifier is None else self.classifier.schedule()

    def merge(self) -> None:
        if self.classifier is not None:
            self.classifier.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        runs = 1 if self.training else self.config.reverse_runs
        found = [self._classified(self.denoised(x, draw), draw) for _ in range(runs)]
        return found[0] if runs == 1 else majority(found)

    def _classified(self, clean: Tensor, draw: Draw) -> Tensor:
        """Return the logits of a denoised image, locally smoothed if so configured."""
        copies, sigma = self.config.local_copies, self.config.local_sigma
        if not copies:
            return self._classify(clean, draw)
        copies = 1 if self.training else copies
        found = [self._classify(clean + sigma * draw.normal(*clean.shape[1:]), draw) for _ in range(copies)]
        if copies == 1:
            return found[0]
        return majority(found) if self.config.local_vote == "majority" else mean_probability(found)

    def _classify(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(x) if self.classifier is None else self.classifier.logits(x, draw)


def majority(logits: list[Tensor]) -> Tensor:
    """Return how many of several predictions [B, classes] are for each class.

    Half of the mean probability is added, which decides ties alone. A row with NaN in any prediction is NaN.
    """
    found = torch.stack(logits).float()
    return F.one_hot(found.argmax(2), found.shape[2]).sum(0) + found.softmax(2).mean(0) / 2


def mean_probability(logits: list[Tensor]) -> Tensor:
    """Return the logarithm of the mean probability of several predictions [B, classes]."""
    return torch.stack(logits).log_softmax(2).logsumexp(0) - math.log(len(logits))
