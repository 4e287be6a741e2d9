"""Train a denoiser in front of the frozen base: denoised smoothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.convmixer import ConvMixer
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.errors import BenchError
from bench.interface import Access, Context, Defense, Draw, Job, Part, Schedule, StepDraw
from bench.io import tensors


class DnCNN(nn.Module):
    """The residual denoiser of Zhang et al. 2017 (arXiv 1608.03981), as built in the released code of 2003.01908."""

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width, eps=1e-4, momentum=0.95), nn.ReLU(inplace=True)]
        last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.net = nn.Sequential(*layers, last)
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.zeros_(last.weight)  # so that training starts from the identity

    def forward(self, x: Tensor) -> Tensor:
        return x - cast(Tensor, self.net(x))


@dataclass(frozen=True)
class MSEDenoiser(Part):
    """A DnCNN trained to reproduce the clean image; it uses no classifier, so all bases share it."""

    sigma: float
    depth: int
    width: int
    schedule: Schedule

    def build(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        return DnCNN(shape[0], self.depth, self.width)

    def fit(self, module: nn.Module, job: Job) -> None:
        def loss(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
            return F.mse_loss(module(_noisy(x, draw)), x)

        job.at("mse", self.sigma).train(module, loss, self.schedule)


# timm's closest counterparts of the 14 networks that the released code trains for CIFAR-10, in its order.
_COUNTERPARTS = {
    "WRN-28-10": "wide_resnet50_2",
    "WRN-40-10": "wide_resnet101_2",
    "VGG16": "repvgg_a0",
    "VGG19": "repvgg_a1",
    "ResNet18": "resnet18",
    "PreActResNet18": "resnetv2_18",
    "ResNeXt29": "resnext50_32x4d",
    "MobileNet": "mobilenetv1_100",
    "MobileNetV2": "mobilenetv2_100",
    "SENet18": "seresnet18",
    "ShuffleNetV2": "ghostnet_100",
    "EfficientNetB0": "efficientnet_b0",
    "GoogLeNet": "xception41",
    "DenseNet121": "densenet121",
}
_SURROGATES = {"small": ("vit", "mixer", "convmixer", "resnet"), "paper": tuple(_COUNTERPARTS.values())}
_SCHEDULES = {
    "small": Schedule(optimizer="adamw", lr=2e-3, weight_decay=0.05, warmup=0.1),
    "paper": Schedule(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, decay="step"),
}


@dataclass(frozen=True)
class Surrogate(Part):
    """A classifier trained clean, whose gradients replace those of a base with QUERY access."""

    model: str
    schedule: Schedule

    def build(self, classes: int, shape: tuple[int, int, int]) -> nn.Module:
        side = max(shape[1:])
        task: dict[str, Any] = {"in_chans": shape[0], "num_classes": classes}
        net: nn.Module
        if self.model in ("vit", "mixer", "convmixer"):  # on a grid of 4x4 or 8x8 patches
            side = 8 * -(-side // 8)
            if self.model == "vit":
                net = VisionTransformer(side, side // 4, embed_dim=48, depth=2, num_heads=3, **task)
            elif self.model == "mixer":
                net = MlpMixer(img_size=side, patch_size=side // 4, embed_dim=48, num_blocks=3, **task)
            else:
                net = ConvMixer(48, 4, kernel_size=3, patch_size=side // 8, **task)
        else:
            # These reduce an image 32-fold. Enlarged fourfold, a small image has the same final resolution as in the
            # paper's networks, whose first strides were removed for CIFAR-10.
            side = 4 * side if side <= 64 else side
            if self.model == "resnet":
                net = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), **task)
            else:
                net = timm.create_model(self.model, **task)
        return nn.Sequential(nn.Upsample((side, side), mode="bilinear"), net)

    def fit(self, module: nn.Module, job: Job) -> None:
        job.train(module, lambda x, y, draw: F.cross_entropy(module(x), y), self.schedule)


class Denoiser(Defense):
    """Denoised smoothing (Salman et al. 2020, arXiv 2003.01908): F(D(x)), where F is the frozen base and D a DnCNN.

    ``objective`` is what D is trained for. ``mse``: reproduce the clean image. ``stab``: F's label of the clean image.
    ``clf``: the true label, by ``--objective`` (the others have losses of their own). ``stab+mse``: fine-tune the
    ``mse`` denoiser by ``stab``. With ``access`` full, gradients
    flow through F. With ``query`` they flow through ``surrogates`` trained here, and F only gives its labels (the
    released code uses the surrogate's own). ``mse`` does not query F, so its ``access`` is always full.

    ``weights`` is the file of a DnCNN trained elsewhere, as ``bench convert`` writes the released ones. Then nothing is
    trained here: ``objective`` states what the file was trained for, and every other setting is ignored.

    ``paper`` is the released DnCNN and its schedule. Differences: the weights are the last of that schedule, while the
    paper chooses a checkpoint on a validation split; the surrogate of a step is drawn at random, while the paper takes
    turns; the surrogates are timm's closest architectures instead of the paper's networks.
    """

    access = Access.GRADIENT
    family = "denoiser"
    trains = "denoiser-trained"
    paper = "2003.01908"

    @dataclass(frozen=True)
    class Config(Schedule):
        """Objective, access and size of the denoiser, and the schedule that trains it and its surrogates."""

        objective: Literal["mse", "stab", "clf", "stab+mse"] = (
            "stab"  # agree with the base on clean images; mse: the clean image
        )
        access: Literal["full", "query"] = "full"  # to the base: gradients; or queries, with surrogates' gradients
        depth: int = 5  # convolutions
        width: int = 32  # channels
        epochs: float = 30
        batch: int = 64
        optimizer: Literal["adamw", "adam", "sgd"] = "adam"
        lr: float = 2e-3
        weight_decay: float = 1e-4
        tune: float = 0.25  # epochs of fine-tuning (stab+mse), as a fraction of epochs
        tune_lr: float = 2e-4  # constant
        surrogates: Literal["small", "paper"] = "small"  # 4 small networks, or 14 of ImageNet's size
        weights: str = ""  # a .safetensors file

        def __post_init__(self) -> None:
            if self.weights:  # no schedule is recorded, and all presets are one configuration
                for field in fields(self):
                    if field.name not in ("objective", "weights"):
                        # The file states its depth and width.
                        value = 0 if field.name in ("depth", "width", "epochs") else field.default
                        object.__setattr__(self, field.name, value)
            elif self.objective == "mse":  # does not query F either way, so it is one configuration
                object.__setattr__(self, "access", "full")

    presets: ClassVar = {
        "paper": {
            "depth": 17,
            "width": 64,
            "epochs": 90,
            "batch": 256,
            "lr": 1e-3,
            "decay": "step",
            "tune": 20 / 90,
            "tune_lr": 1e-5,
            "surrogates": "paper",
        }
    }

    @classmethod
    def kind(cls, config: Config) -> str:
        return "training-free" if config.weights else cls.trains

    @classmethod
    def uses_objective(cls, config: Config) -> bool:
        return config.objective == "clf" and not config.weights

    @classmethod
    def differentiable(cls, config: Config) -> bool:
        return True  # by the surrogates, where F only answers queries

    @classmethod
    def needs(cls, config: Config) -> Access:
        through_base = config.access == "full" and config.objective != "mse" and not config.weights
        return Access.GRADIENT if through_base else Access.QUERY

    def build(self) -> None:
        config = self.config
        # A tuple registers no submodules: surrogates are not part of F, and are not stored with it.
        self.surrogates: tuple[nn.Module, ...] = ()
        if config.weights:
            self.denoiser: nn.Module = load(self.context, config.weights)
            return
        if config.depth < 2 or config.width < 1:
            raise BenchError(
                f"denoiser: depth {config.depth} and width {config.width} are too small for a DnCNN; "
                "set a depth of at least 2 and a width of at least 1"
            )
        plain = Schedule(**{f.name: getattr(config, f.name) for f in fields(Schedule)})
        if "mse" in config.objective:
            part = MSEDenoiser(self.context.train_sigma, config.depth, config.width, plain)
            # Unfrozen for fine-tuning instead of copied, so that its parameters are counted once.
            self.denoiser = self.context.once(part).requires_grad_(config.objective != "mse")
        else:
            self.denoiser = DnCNN(self.context.shape[0], config.depth, config.width)
        if config.objective != "mse" and config.access == "query":
            schedule = replace(_SCHEDULES[config.surrogates], epochs=config.epochs, batch=config.batch)
            self.surrogates = tuple(
                self.context.once(Surrogate(name, schedule)) for name in _SURROGATES[config.surrogates]
            )

    def schedule(self) -> Schedule:
        config: Denoiser.Config = self.config
        if config.objective == "stab+mse":
            return replace(config, epochs=config.tune * config.epochs, lr=config.tune_lr, decay="constant")
        return config

    def loss(self, x: Tensor, y: Tensor, draw: StepDraw, job: Job) -> Tensor:
        classifier: Callable[[Tensor], Tensor] = self.context.base
        if self.surrogates:
            # Torch's random state depends on the step alone, so a resumed run draws the same.
            classifier = self.surrogates[int(torch.randint(len(self.surrogates), ()))]
        if self.config.objective == "clf":
            return job.objective(lambda z, _: classifier(self.denoiser(z)), x, y, draw)
        return F.cross_entropy(classifier(self.denoiser(_noisy(x, draw))), self.context.base(x).argmax(1))

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(self.denoiser(x))


def load(context: Context, source: str) -> DnCNN:
    """Load a frozen DnCNN from a file; its depth and width are those of its tensors. Raises BenchError."""
    stored = tensors.read(context.hub(source))
    stem, depth = stored.tensors.get("net.0.weight"), sum(v.ndim == 4 for v in stored.tensors.values())
    if stem is None or stem.ndim != 4 or depth < 2:
        raise BenchError(
            f"denoiser: weights={source} is no DnCNN (no net.0.weight); convert the released checkpoint: "
            f"bench convert FILE --to OUT.safetensors"
        )
    width, channels = stem.shape[:2]
    if channels != context.shape[0]:
        raise BenchError(
            f"denoiser: weights={source} takes {channels} channels, the images have {context.shape[0]}; use another"
        )
    net = DnCNN(channels, depth, width)
    state = net.state_dict()
    counters = {k for k in state if k.endswith(tensors.COUNTER)}
    tensors.check(f"denoiser: weights={source} does not fit a DnCNN", state, stored.tensors, counters)
    net.load_state_dict({**state, **stored.tensors})
    context.note(
        f"denoiser: weights={source}: a DnCNN of depth {depth} and width {width}, trained elsewhere at a noise level "
        f"that the file does not state; nothing is trained here, and settings of training have no effect"
    )
    if kinds := sorted({str(v.dtype).removeprefix("torch.") for v in stored.tensors.values() if v.ndim} - {"float32"}):
        context.note(f"denoiser: {source} is stored as {' and '.join(kinds)}, computed in float32")
    return net.eval().requires_grad_(False)


def _noisy(x: Tensor, draw: Draw) -> Tensor:
    return x + draw.sigma * draw.normal(*x.shape[1:])
