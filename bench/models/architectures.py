"""Architectures that timm does not have, registered with it; import timm from here where one may be named."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm as timm
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from bench.models import transformers_architecture as transformers_architecture


class CifarResNet(nn.Module):
    """The residual network for 3x32x32 of Cohen et al. 2019 (locuslab/smoothing, archs/cifar_resnet.py).

    A 3x3 stem, three stages of widths 16, 32 and 64, and shortcuts by a strided 1x1 convolution with a batch norm where
    the width changes. He et al. 2016 have shortcuts without parameters there (1,727,962 parameters, not 1,730,714).
    Tensors have the released names, and the released initialisation.
    """

    def __init__(self, blocks: int = 18, num_classes: int = 10, in_chans: int = 3) -> None:
        """``blocks``: basic blocks of each stage; 18 make 110 layers."""
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the layer from features to logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes: no head. ``global_pool`` is part of timm's interface and has no effect."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute feature maps [B, 64, H/4, W/4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits of feature maps, or their average over the image."""
        x = self.global_pool(x).flatten(1)
        out: Tensor = x if pre_logits else self.fc(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        return self.forward_head(self.forward_features(x))


def _stage(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or width_in != width:
        shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(
        BasicBlock(width_in, width, stride, shortcut), *(BasicBlock(width, width) for _ in range(blocks - 1))
    )


default_cfgs = generate_default_cfgs(  # where timm looks for them
    {
        "resnet110": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "vit_earlyconv": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "patch_embed.backbone.0.conv",
            "classifier": "head",
        },
    }
)


@register_model
def resnet110(pretrained: bool = False, **args: Any) -> nn.Module:
    """Make Cohen et al.'s ResNet-110 for CIFAR-10."""
    model: nn.Module = build_model_with_cfg(CifarResNet, "resnet110", pretrained, **args)
    return model


@register_model
def vit_earlyconv(pretrained: bool = False, stem_width: int = 48, **args: Any) -> nn.Module:
    """Make timm's vision transformer with early convolutions in place of patches (Xiao et al. 2021, arXiv 2106.14881).

    Four 3x3 convolutions, each with a batch norm and a ReLU, then a 1x1 convolution to the transformer's width: a token
    for each 4x4 pixels. The strides are those for 32x32 images; the paper's are 2, for 224x224.

    Args:
        pretrained: Part of timm's interface; there are no published weights.
        stem_width: Channels of the first two convolutions; the next two have twice as many.
        args: Further arguments of timm's ``VisionTransformer``; by default width 128, depth 4, 4 heads.
    """
    args = {"img_size": 32, "in_chans": 3, "embed_dim": 128, "depth": 4, "num_heads": 4} | args
    stem = ConvStem(
        in_chans=args["in_chans"],
        depth=5,
        channels=(stem_width, stem_width, 2 * stem_width, 2 * stem_width, args["embed_dim"]),
        kernel_size=(3, 3, 3, 3, 1),
        stride=(1, 2, 1, 2, 1),
    )
    # timm's class for tokens of a convnet; patch_size counts its output's pixels.
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    model: nn.Module = build_model_with_cfg(
        VisionTransformer, "vit_earlyconv", pretrained, embed_layer=embed, patch_size=1, **args
    )
    return model
