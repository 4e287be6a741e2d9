"""Learn a visual prompt for each image by querying the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from bench.errors import BenchError, one_line
from bench.interface import Access, Defense, Draw, Job, Step
from bench.io import tensors
from bench.models.resampling import check_interpolation, resample
from bench.models.timm_configs import described, read_config
from bench.training.autoencoder import MaskedAutoencoder, PatchEncoder, resized
from bench.training.prompts import Whitening, blackvip_decoder, patch_decoder
from bench.training.spsa import SPSA, Diverged, Gains, Replay

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Coordinator(Defense):
    """BlackVIP (Oh et al. 2023, arXiv 2303.14773): a frozen encoder, and a small decoder trained by SPSA-GC.

    The base is queried with clip(x + p_eps * prompt(x)); neither gradients nor weights are used. ``paper`` uses the
    released encoder (ViT-MAE-B, class token before the last layer norm), decoder (9,920 parameters with its trigger,
    for three channels) and constants, with certbench's own query budget. It differs from the released code where that
    would invalidate a certificate or add noise to probes: the encoder sees clipped pixels; batch norms take their
    statistics from the first batch, once; all probes of a step see the same noise; the 224x224 prompt is resized to the
    image instead of the image to the prompt.

    ``units`` says what ``p_eps`` counts. In the released code, images are normalised by CLIP's mean and std before
    encoder and prompt, and clipped to the range of pixels after it. ``units=clip``, that of ``paper``, is the same in
    pixels: p_eps 1 is one of CLIP's standard deviations, .269 .261 .276 of the pixel range in red, green and blue, and
    a stored encoder gets images in CLIP's statistics. ``units=pixels``, that of the other presets, counts the pixel
    range itself, and a stored encoder gets images in its own config's statistics.

    In the other presets the encoder is a small masked autoencoder trained here on clean images, and the decoder one
    transposed convolution of the principal components of its patch tokens, so that the prompt follows the image patch
    by patch, and a random direction affects all weights equally. ``method=gradient`` trains the same decoder through
    the base, as an upper bound for SPSA.
    """

    prompt_weight: Tensor  # p_eps in pixels, [C, 1, 1]

    access = Access.QUERY
    family = "black-box"
    trains = "classifier-tuned"
    paper = "2303.14773"

    @dataclass(frozen=True)
    class Config:
        """Encoder, weight of the prompt, budget, and SPSA's gains (see ``bench.training.spsa.Gains``)."""

        encoder: str = ""  # hub id or folder of a timm ViT; empty: a small one is trained here
        p_eps: float = 0.5  # weight of the prompt, in ``units``
        units: Literal["pixels", "clip"] = (
            "pixels"  # in which the prompt is added: [0, 1], or those of CLIP's normalisation
        )
        method: Literal["spsa-gc", "spsa", "one-sided", "gradient"] = "spsa-gc"
        queries: int = 320_000  # maximum images passed to the base in training
        batch: int = 32  # images of a step
        probes: int = 5  # directions of a step
        a: float = 0.0005  # step size: a / (step + o)^alpha
        c: float = 0.02  # size of a probe: c / step^gamma
        o: float = 10.0
        alpha: float = 0.4
        gamma: float = 0.1
        b: float = 0.9  # momentum of spsa-gc
        lr: float = 0.01  # of method=gradient: Adam, decaying linearly to 0

    presets: ClassVar = {
        "paper": {
            "encoder": "timm/vit_base_patch16_224.mae",
            "p_eps": 1.0,
            "units": "clip",
            "queries": 6_400_000,  # 5,000 steps
            "batch": 128,
            "a": 0.01,
            "c": 0.01,
            "o": 1.0,
        }
    }

    @classmethod
    def needs(cls, config: Any) -> Access:
        return Access.GRADIENT if config.method == "gradient" else Access.QUERY

    def build(self) -> None:
        for name in ("batch", "probes", "p_eps", "a", "c"):
            if getattr(self.config, name) <= 0:
                raise BenchError(f"coordinator: {name} must be above 0")
        self._check_budget(self.config.batch * self._evaluations())
        self.register_buffer("prompt_weight", self._prompt_weight(), persistent=False)
        self.encoder: nn.Module
        if self.config.encoder:
            self.encoder = self._stored_encoder(self.config.encoder)
            self.decoder = blackvip_decoder(cast(int, self.encoder.width), self.context.shape[0])
        else:
            self.encoder = self.context.once(MaskedAutoencoder())
            self.decoder = patch_decoder(cast(PatchEncoder, self.encoder), self.context.shape[0])

    def _prompt_weight(self) -> Tensor:
        """Return p_eps as a fraction of the pixel range, for each channel [C, 1, 1]."""
        channels, p_eps = self.context.shape[0], self.config.p_eps
        if self.config.units == "pixels":
            return torch.full((channels, 1, 1), p_eps)
        if channels not in (1, 3):
            raise BenchError(f"coordinator: units=clip is for 1 or 3 channels, the images have {channels}; use pixels")
        std = torch.tensor(CLIP_STD)
        weight: Tensor = p_eps * (std if channels == 3 else std.mean(0, keepdim=True))
        range_ = " ".join(f"{w:.3g}" for w in weight.tolist())
        self.context.note(f"coordinator: p_eps={p_eps:g} of CLIP's standard deviations: {range_} of the pixel range")
        return weight.view(-1, 1, 1)

    def _stored_encoder(self, source: str) -> nn.Module:
        what = f"coordinator: encoder {source}"
        found = described(what, read_config(self.context.hub(source, "config.json"), what), "config.json")
        stored, file = tensors.read_stored("model", lambda name: self.context.hub(source, name))
        # Its head is not used, and may be missing from the file even if the config has one.
        heads = (found.architecture.config or {}).get("classifier")
        names = [heads] if isinstance(heads, str) else list(heads or ())
        classes = found.classes if any(f"{name}.weight" in stored.tensors for name in names) else 0
        model, remarks = found.architecture.load(classes, stored.tensors, file, adapt=True)
        model.reset_classifier(0)  # type: ignore[operator]
        if self.context.shape[0] not in (1, found.channels):
            raise BenchError(
                f"{what} takes {found.channels} channels; the images have {self.context.shape[0]}; leave encoder out"
            )
        if found.size != self.context.shape[1:]:
            check_interpolation(what, found.interpolation)
        mean, std, mean_from = found.mean, found.std, f"from {found.mean_from}"
        if self.config.units == "clip":
            if found.channels != 3:
                raise BenchError(f"{what} takes {found.channels} channels, not CLIP's 3; set units=pixels")
            mean, std, mean_from = CLIP_MEAN, CLIP_STD, "CLIP's, as in BlackVIP's code"
        # BlackVIP takes the last block's output.
        normalised = not isinstance(getattr(model, "norm", None), nn.Identity | None)
        if normalised:
            model.norm = nn.Identity()
        encoder = StoredEncoder(model.eval().requires_grad_(False), mean, std, found.size, found.interpolation)
        try:
            features = model.forward_features(torch.zeros(1, found.channels, *found.size))  # type: ignore[operator]
        except Exception as e:  # timm's models raise errors of any type
            raise BenchError(f"{what} cannot take images of {found.size}: {one_line(e)}; use another") from None
        token = getattr(model, "cls_token", None)
        if not isinstance(token, Tensor) or not isinstance(features, Tensor) or features.ndim != 3:
            kind = type(model).__name__
            raise BenchError(
                f"{what}: this {kind} has no class token, from which the prompt is computed; give a ViT with one, such "
                f"as timm/vit_base_patch16_224.mae, or leave encoder out"
            )
        height, width = found.size
        resized_to = f"images are resized to {height}x{width} ({found.interpolation}), mean and std are {mean_from}"
        token_of = "class token before its last norm" if normalised else "class token of its features"
        self.context.note("; ".join([f"{what}: {resized_to}; {token_of}", *remarks]))
        return encoder

    @classmethod
    def differentiable(cls, config: Any) -> bool:
        return False  # nor by method=gradient: the encoder is not differentiated

    def _evaluations(self) -> int:
        probes: int = self.config.probes
        return {"one-sided": 1 + probes, "gradient": 1}.get(self.config.method, 2 * probes)

    def _check_budget(self, step: int) -> None:
        if self.config.queries < step:
            raise BenchError(f"coordinator: one step takes {step} queries; set at least --set queries={step}")

    def fit(self, job: Job) -> None:
        """Train the decoder and its trigger until the query budget is used up."""
        config = self.config
        parameters = list(self.decoder.parameters())
        gains = Gains(
            config.a, config.c, config.o, config.alpha, config.gamma, config.b if config.method == "spsa-gc" else 0.0
        )
        spsa = SPSA(parameters, gains, config.probes, one_sided=config.method == "one-sided")
        adam = torch.optim.Adam(parameters)
        # An objective with several copies of an image reaches the budget in fewer steps.
        count = config.queries // (config.batch * self._evaluations())
        for step in job.steps(count, config.batch, self.decoder, spsa, adam, queries=config.queries):
            if step.number == 0:
                self._set_statistics(step)
            before = self.context.base.queries
            loss = self._loss_of(step, job)
            if config.method == "gradient":
                adam.param_groups[0]["lr"] = config.lr * (1 - step.number / count)
                value = loss()
                adam.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                adam.step()
                step.report(value.detach())
            else:
                with _explained():
                    step.report(spsa.step(loss))
            if step.number == 0:
                self._check_budget(self.context.base.queries - before)
        with _explained():
            spsa.check_end()

    def _set_statistics(self, step: Step) -> None:
        """Set the statistics of batch norms and whitening from a noisy batch; probes must not change them."""
        norms = [m for m in self.decoder.modules() if isinstance(m, nn.BatchNorm2d | Whitening)]
        for norm in norms:
            norm.train()
        with torch.no_grad():
            self.decoder(self.encode(step.x + step.draw.sigma * step.draw.normal(*step.x.shape[1:])))
        for norm in norms:
            norm.eval()

    def _loss_of(self, step: Step, job: Job) -> Callable[[], Tensor]:
        """Return the step's loss as a function of the decoder alone, with the same noise at every call."""
        replay = Replay(step.draw)
        known: list[tuple[Tensor, Tensor]] = []  # the encoder is frozen, so each noisy batch is encoded once

        def logits(x: Tensor, draw: Draw) -> Tensor:
            z = next((z for seen, z in known if torch.equal(seen, x)), None)
            if z is None:
                z = self.encode(x)
                known.append((x.detach(), z))
            return self.answer(x, z)

        def loss() -> Tensor:
            replay.rewind()
            return job.objective(logits, step.x, step.y, replay)

        return loss

    def encode(self, x: Tensor) -> Tensor:
        """Return the encoder's features of the clipped image, since it was trained on pixels in [0, 1]."""
        with torch.no_grad():
            return cast(Tensor, self.encoder(x.clamp(0, 1)))

    def answer(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the base's logits, in float32, of the image with its prompt."""
        prompt = resized(self.decoder(features), x.shape[-2:])
        return self.context.base((x + self.prompt_weight * prompt).clamp(0, 1)).float()

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.answer(x, self.encode(x))


@contextmanager
def _explained() -> Iterator[None]:
    """Turn divergence into an error that names the settings to change."""
    try:
        yield
    except Diverged as e:
        fix = "tune with --set, in this order: a (lower), alpha (higher), p_eps (lower), b (lower)"
        raise BenchError(f"coordinator: {e}; {fix}") from None


class StoredEncoder(nn.Module):
    """A timm ViT with resizing and normalisation inside: pixels in [0, 1] to the class token."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int],
        interpolation: str,
    ) -> None:
        super().__init__()
        self.model, self.size, self.width = model, size, int(model.num_features)  # type: ignore[arg-type]
        self.interpolation = interpolation
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != self.size:
            x = resample(x, self.size, self.interpolation)
        # A grey image broadcasts over the model's channels.
        return cast(Tensor, self.model.forward_features((x - self.mean) / self.std)[:, 0])  # type: ignore[operator]
