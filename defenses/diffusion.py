"""Denoise with a diffusion model in front of the frozen base."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bench.errors import BenchError
from bench.interface import Access, Context, Defense, Draw, Job, Part, Schedule
from bench.io import tensors
from bench.io.hub import MissingFile

# Any, since diffusers' decorators hide its types.
UNET: Any = diffusers.UNet2DModel
DDPM: Any = diffusers.DDPMScheduler
WEIGHTS = "diffusion_pytorch_model"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = 1000  # of a schedule whose network is asked at the step itself
FURTHEST = 4  # most times that images may be larger or smaller than those of the network's training
# Names of attention layers in diffusers before 0.13, when google/ddpm-cifar10-32 was published, and now.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


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


class DiffusionDenoised(Defense):
    """One-shot diffusion denoising (Carlini et al. 2022, arXiv 2206.10550).

    The noise of the certified input is used as the diffusion's noise: its level determines the step, one prediction
    gives the clean image, and the classifier sees that. The released code adds noise to the clean image itself, at the
    level of the step; here the noise has exactly sigma, slightly less. Of a model with learned variance only the mean
    is used. The base resizes denoised images by its own interpolation; the paper's resize bicubically. ``unet`` is a
    diffusers UNet, a hub id or a folder; if empty, a small one is trained here. A network of another image size is
    used where its down-samplings divide the images' sides, as the paper uses ADM 256 on 224x224. ``paper`` uses the
    public CIFAR-10 weights in diffusers' format (Ho et al., linear, 1,000 steps); the paper's own are Nichol and
    Dhariwal's (cosine, 4,000 steps).

    ``timestep_scale`` is what a network's steps are multiplied by. Improved- and guided-diffusion (Nichol and Dhariwal)
    ask a network of T steps at t * 1000 / T, so give 1000 / T for their weights, and 1 for a network that was trained
    with the step itself, as diffusers does. It must be given where the scheduler does not have 1,000 steps.

    ``steps`` above 1 denoises in that many evenly spaced steps of ancestral sampling (Ho et al. 2020), whose randomness
    belongs to the vote. ``classifier`` names a defense trained behind the denoiser in place of the base, with its own
    schedule; the schedule set here is that of the diffusion model.
    """

    access = Access.QUERY
    family = "diffusion"
    trains = "training-free"
    paper = "2206.10550"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Checkpoint, number of denoising steps, classifier; width and schedule of a model trained here."""

        unet: str = ""
        timestep_scale: float | None = None  # None: 1, for a scheduler of 1,000 steps
        steps: int = 1
        classifier: str = ""
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
        self.prediction: str = scheduler.config.prediction_type
        self.alphas: list[float] = scheduler.alphas_cumprod.double().tolist()
        self.scale = self._timestep_scale()
        self.times(self.context.train_sigma)  # raises before anything is trained
        if config.width < 8 or config.width % 8:
            raise BenchError(f"diffusion: width={config.width} must be a multiple of 8")
        self.unet = cast(Averaged, self.context.once(part)).net if unet is None else unet
        self.classifier = self.context.inner(config.classifier) if config.classifier else None
        inner = type(self.classifier or self)
        if inner.fit is not Defense.fit or inner.loss is not Defense.loss:
            raise BenchError(f"diffusion: classifier={config.classifier} has its own training; use full or lora")

    def _timestep_scale(self) -> float:
        given, count, unet = self.config.timestep_scale, len(self.alphas), self.config.unet
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

    def times(self, sigma: float) -> list[int]:
        """Return the steps at which the UNet is evaluated, counted from 0.

        The first is the lowest whose noise relative to the image is at least 2 sigma (2, since [0, 1] is scaled to
        [-1, 1]).
        """
        first = next((t for t, kept in enumerate(self.alphas) if kept <= 1 / (1 + 4 * sigma**2)), None)
        if first is None:
            most = (1 / self.alphas[-1] - 1) ** 0.5 / 2
            raise BenchError(f"diffusion: sigma {sigma:g} is above the schedule's last step, {most:.3g}; lower --sigma")
        steps = self.config.steps
        if not 1 <= steps <= first + 1:
            raise BenchError(f"diffusion: steps={steps}: must be 1 to {first + 1} for sigma {sigma:g}")
        # Step -1 would be the clean image, so that steps = first + 1 visits every step.
        return [first - i * (first + 1) // steps for i in range(steps)]

    def predict(self, noisy: Tensor, t: int) -> Tensor:
        """Predict the clean image, in [-1, 1], from the noisy image of step ``t``."""
        kept = self.alphas[t]
        # As a tensor, since diffusers truncates a Python number to an integer.
        asked = t if self.scale == 1 else noisy.new_tensor(t * self.scale)
        out: Tensor = self.unet(noisy, asked).sample[:, : noisy.shape[1]]  # the rest is a learned variance
        if self.prediction == "epsilon":
            out = noisy / kept**0.5 - (1 / kept - 1) ** 0.5 * out
        elif self.prediction == "v_prediction":
            out = kept**0.5 * noisy - (1 - kept) ** 0.5 * out
        return out.clamp(-1, 1)

    def denoised(self, x: Tensor, draw: Draw) -> Tensor:
        """Denoise noisy pixels [B, C, H, W]; return pixels in [0, 1]."""
        times = self.times(draw.sigma)
        noisy = self.alphas[times[0]] ** 0.5 * (2 * x - 1)
        clean = self.predict(noisy, times[0])
        for t, after in pairwise(times):
            # q(x_after | x_t, x_0) of the chain with only these steps.
            kept, more = self.alphas[t], self.alphas[after]
            spread = 1 - kept / more
            mean = (more**0.5 * spread * clean + (kept / more) ** 0.5 * (1 - more) * noisy) / (1 - kept)
            noisy = mean + (spread * (1 - more) / (1 - kept)) ** 0.5 * draw.normal(*x.shape[1:])
            clean = self.predict(noisy, after)
        return (clean + 1) / 2

    def schedule(self) -> Schedule:
        return super().schedule() if self.classifier is None else self.classifier.schedule()

    def merge(self) -> None:
        if self.classifier is not None:
            self.classifier.merge()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        clean = self.denoised(x, draw)
        return self.context.base(clean) if self.classifier is None else self.classifier.logits(clean, draw)


def load(context: Context, source: str) -> tuple[nn.Module, Any]:
    """Load a frozen UNet and its scheduler from a folder or the hub, in diffusers' layout. Raises BenchError."""
    config, name = _first_json(context, source, "config.json", "unet/config.json")
    plan, _ = _first_json(context, source, "scheduler_config.json", "scheduler/scheduler_config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel" or config.get("class_embed_type") or config.get("num_class_embeds"):
        raise BenchError(f"diffusion: unet={source} is a {kind}; give an unconditional UNet2DModel")
    unet = UNET.from_config(config, dropout=0.0)  # never trained here, even in training mode
    _check_shape(context, source, unet)
    maker: Any = getattr(diffusers, str(plan.get("_class_name")), None)
    scheduler = maker.from_config(plan) if str(plan.get("_class_name")).endswith("Scheduler") and maker else None
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in PREDICTIONS:
        raise BenchError(
            f"diffusion: unet={source}: its scheduler {plan.get('_class_name')} (predicting {prediction}) is not "
            f"supported; use one with alphas_cumprod that predicts {', '.join(PREDICTIONS)}"
        )
    stem = name.removesuffix("config.json") + WEIGHTS
    try:
        stored, file = tensors.read_stored(stem, lambda name: context.hub(source, name))
    except MissingFile:
        there = sorted(f.name for f in (Path(source) / stem).parent.glob("*.safetensors"))
        if there:  # another variant (non_ema) may hold other weights
            fix = f"it has {', '.join(there)}: save the right one as {stem}.safetensors"
        else:
            fix = (
                "a pickled .bin is refused, since reading it can run hidden code; if you trust it, load it and call "
                "save_pretrained(..., safe_serialization=True)"
            )
        raise BenchError(
            f"diffusion: unet={source} has no {stem}.safetensors, no shards and no fp16 or bf16 variant of it; {fix}"
        ) from None
    state = stored.tensors
    for old, new in RENAMED.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    tensors.check(f"diffusion: {file} does not fit its config.json", unet.state_dict(), state)
    unet.load_state_dict(state)
    if kinds := sorted({str(v.dtype).removeprefix("torch.") for v in state.values()} - {"float32"}):
        context.note(f"diffusion: {file} of unet={source} is stored as {' and '.join(kinds)}, computed in float32")
    return unet.eval().requires_grad_(False), scheduler


def _check_shape(context: Context, source: str, unet: Any) -> None:
    """Raise BenchError where the UNet does not fit the images; note another size than that of its training."""
    channels, size = unet.config.in_channels, unet.config.sample_size or context.shape[1:]
    shape = (channels, *((size, size) if isinstance(size, int) else size))
    theirs, ours = ("x".join(map(str, s)) for s in (shape, context.shape))
    problem = f"diffusion: unet={source} is for {theirs} images, the data are {ours}"
    fix = "--set unet= trains one here"
    if channels != context.shape[0] or unet.config.out_channels not in (channels, 2 * channels):
        raise BenchError(f"{problem}; {fix}")
    if shape == context.shape:
        return
    sides = [*zip(shape[1:], context.shape[1:], strict=True)]
    step = 2 ** (len(unet.config.block_out_channels) - 1)  # every block but the last halves the sides
    if any(side % step for _, side in sides):
        raise BenchError(f"{problem}, and its down-samplings need sides that {step} divides; {fix}")
    if any(max(pair) > FURTHEST * min(pair) for pair in sides):
        raise BenchError(f"{problem}, a size more than {FURTHEST} times another; {fix}")
    context.note(f"{problem}: it is used at another size than it was trained at")


def _first_json(context: Context, source: str, *names: str) -> tuple[dict[str, Any], str]:
    """Read the first of the files that is available; return its object and name. Raises BenchError."""
    failed: list[BenchError] = []
    for name in names:
        try:
            path = context.hub(source, name)
            return json.loads(path.read_text()), name
        except BenchError as e:  # not only MissingFile: offline, a missing file cannot be recognised
            failed.append(e)
        except ValueError:
            raise BenchError(f"diffusion: {path} is not JSON; save the model again") from None
    missing = BenchError(f"diffusion: unet={source} has neither {' nor '.join(names)}; give a diffusers model")
    raise next((e for e in failed if not isinstance(e, MissingFile)), missing)
