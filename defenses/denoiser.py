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
from bench.interface import Access, Defense, Draw, Job, Part, Schedule


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
    ``clf``: the true label. ``stab+mse``: fine-tune the ``mse`` denoiser by ``stab``. With ``access`` full, gradients
    flow through F. With ``query`` they flow through ``surrogates`` trained here, and F only gives its labels (the
    released code uses the surrogate's own). ``mse`` does not query F, so its ``access`` is always full.

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

        objective: Literal["mse", "stab", "clf", "stab+mse"] = "stab"
        access: Literal["full", "query"] = "full"
        depth: int = 5
        width: int = 32
        epochs: float = 30
        batch: int = 64
        optimizer: Literal["adamw", "adam", "sgd"] = "adam"
        lr: float = 2e-3
        weight_decay: float = 1e-4
        tune: float = 0.25  # epochs of fine-tuning (stab+mse), as a fraction of epochs
        tune_lr: float = 2e-4  # constant
        surrogates: Literal["small", "paper"] = "small"  # 4 small networks, or 14 of ImageNet's size

        def __post_init__(self) -> None:
            if self.objective == "mse":  # does not query F either way, so it is one configuration
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
    def needs(cls, config: Config) -> Access:
        through_base = config.access == "full" and config.objective != "mse"
        return Access.GRADIENT if through_base else Access.QUERY

    def build(self) -> None:
        config = self.config
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
        # A tuple registers no submodules: surrogates are not part of F, and are not stored with it.
        self.surrogates: tuple[nn.Module, ...] = ()
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

    def loss(self, x: Tensor, y: Tensor, draw: Draw, job: Job) -> Tensor:
        classifier: Callable[[Tensor], Tensor] = self.context.base
        if self.surrogates:
            # Torch's random state depends on the step alone, so a resumed run draws the same.
            classifier = self.surrogates[int(torch.randint(len(self.surrogates), ()))]
        target = y if self.config.objective == "clf" else self.context.base(x).argmax(1)
        return F.cross_entropy(classifier(self.denoiser(_noisy(x, draw))), target)

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        return self.context.base(self.denoiser(x))


def _noisy(x: Tensor, draw: Draw) -> Tensor:
    return x + draw.sigma * draw.normal(*x.shape[1:])
