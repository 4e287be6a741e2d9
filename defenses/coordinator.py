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
from bench.models.timm_configs import described, read_config
from bench.training.autoencoder import MaskedAutoencoder, PatchEncoder, resized
from bench.training.spsa import SPSA, Diverged, Gains, Replay


class Coordinator(Defense):
    """BlackVIP (Oh et al. 2023, arXiv 2303.14773): a frozen encoder, and a small decoder trained by SPSA-GC.

    The base is queried with clip(x + p_eps * prompt(x)); neither gradients nor weights are used. ``paper`` uses the
    released encoder (ViT-MAE-B, class token), decoder (9,920 parameters with its trigger, for three channels) and
    constants, with certbench's own query budget. It differs from the released code where that would invalidate a
    certificate or add noise to probes: the encoder sees the complete clipped image (there, a random three quarters of
    its patches are hidden); batch norms take their statistics from the first batch, once; all probes of a step see the
    same noise; the 224x224 prompt is resized to the image instead of the image to the prompt.

    In the other presets the encoder is a small masked autoencoder trained here on clean images, and the decoder one
    transposed convolution of the principal components of its patch tokens, so that the prompt follows the image patch
    by patch, and a random direction affects all weights equally. ``method=gradient`` trains the same decoder through
    the base, as an upper bound for SPSA.
    """

    access = Access.QUERY
    family = "black-box"
    trains = "classifier-tuned"
    paper = "2303.14773"

    @dataclass(frozen=True)
    class Config:
        """Encoder, weight of the prompt, budget, and SPSA's gains (see ``bench.training.spsa.Gains``)."""

        encoder: str = ""  # hub id or folder of a timm ViT; empty: a small one is trained here
        p_eps: float = 0.5
        method: Literal["spsa-gc", "spsa", "one-sided", "gradient"] = "spsa-gc"
        queries: int = 320_000  # maximum images passed to the base in training
        batch: int = 32
        probes: int = 5  # directions of a step
        a: float = 0.0005
        c: float = 0.02
        o: float = 10.0
        alpha: float = 0.4
        gamma: float = 0.1
        b: float = 0.9  # momentum of spsa-gc
        lr: float = 0.01  # of method=gradient: Adam, decaying linearly to 0

    presets: ClassVar = {
        "paper": {
            "encoder": "timm/vit_base_patch16_224.mae",
            "p_eps": 1.0,
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
        self.encoder: nn.Module
        if self.config.encoder:
            self.encoder = self._stored_encoder(self.config.encoder)
            self.decoder = blackvip_decoder(cast(int, self.encoder.width), self.context.shape[0])
        else:
            self.encoder = self.context.once(MaskedAutoencoder())
            self.decoder = patch_decoder(cast(PatchEncoder, self.encoder), self.context.shape[0])

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
        encoder = StoredEncoder(model.eval().requires_grad_(False), found.mean, found.std, found.size)
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
        resized_to = f"images are resized to {height}x{width}, mean and std are from {found.mean_from}"
        self.context.note("; ".join([f"{what}: {resized_to}", *remarks]))
        return encoder

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
        return self.context.base((x + self.config.p_eps * prompt).clamp(0, 1)).float()

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


class Decoder(nn.Module):
    """Map normalised features [B, ...], concatenated with a trainable trigger, to a prompt."""

    def __init__(self, normalise: nn.Module, trigger: Tensor, body: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.trigger = nn.Parameter(trigger)
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        trigger = self.trigger.expand(len(features), *self.trigger.shape)
        return cast(Tensor, self.body(torch.cat([self.normalise(features), trigger], dim=1)))


def blackvip_decoder(width: int, channels: int) -> Decoder:
    """Make BlackVIP's decoder: features and trigger as 32 planes of 7x7, doubled five times to 224x224."""
    planes, side = 32, 7
    if width >= planes * side**2:
        raise BenchError(f"coordinator: an encoder of width {width} leaves no space for a trigger; use a smaller one")
    body: list[nn.Module] = [nn.Unflatten(1, (planes, side, side))]
    for spread, out in ((64, 64), (64, 32), (32, 32), (32, 16)):
        body += [
            nn.ConvTranspose2d(planes, spread, 2, 2, groups=planes),
            nn.ConvTranspose2d(spread, out, 1, bias=False),
            nn.BatchNorm2d(out, momentum=None),  # None: the mean over the batches of training mode, here one
            nn.GELU(),
        ]
        planes = out
    body.append(nn.ConvTranspose2d(planes, channels, 2, 2, bias=False))
    return Decoder(nn.Identity(), torch.rand(32 * side**2 - width) / 10, nn.Sequential(*body))


def patch_decoder(encoder: PatchEncoder, channels: int) -> Decoder:
    """Make one transposed convolution from tokens to patches, initialised to zero, that is, to no prompt."""
    components = encoder.width // 2
    body = nn.ConvTranspose2d(components + 1, channels, encoder.patch, encoder.patch)
    for p in body.parameters():
        nn.init.zeros_(p)
    trigger = torch.rand(1, encoder.grid, encoder.grid) / 10
    return Decoder(Whitening(encoder.width, components), trigger, body)


class Whitening(nn.Module):
    """The leading principal components of a feature map, scaled to variance 1; set by the batch in training mode.

    SPSA perturbs all weights equally. The mean of raw features alone has a third of the energy, and would limit the
    step to a size far too small for all other components.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("map", torch.eye(width)[:, :components].contiguous())

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            rows = z.movedim(1, -1).flatten(0, -2)
            variance, axes = torch.linalg.eigh(torch.cov(rows.T))
            leading = slice(-self.map.shape[1], None)
            self.mean.copy_(rows.mean(0))
            self.map.copy_(axes[:, leading] / variance[leading].clamp(min=1e-6).sqrt())
        return torch.einsum("bwij,wc->bcij", z - self.mean[:, None, None], self.map)


class StoredEncoder(nn.Module):
    """A timm ViT with resizing and normalisation inside: pixels in [0, 1] to the class token."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.model, self.size, self.width = model, list(size), int(model.num_features)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # A grey image broadcasts over the model's channels.
        x = (resized(x, self.size) - self.mean) / self.std
        return cast(Tensor, self.model.forward_features(x)[:, 0])  # type: ignore[operator]
