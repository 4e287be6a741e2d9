"""Register the vision transformer of Hugging Face's transformers with timm, which has no argument for its epsilon."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

NAME = "vit_of_transformers"

default_cfgs = generate_default_cfgs(  # where timm looks for them
    {
        NAME: {
            "num_classes": 2,
            "input_size": (3, 224, 224),
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_of_transformers(pretrained: bool = False, norm_eps: float = 1e-12, **args: Any) -> nn.Module:
    """Make timm's VisionTransformer with the layer norms of transformers; ``norm_eps``: added to their variance."""
    norm = partial(LayerNorm, eps=norm_eps)
    model: nn.Module = build_model_with_cfg(VisionTransformer, NAME, pretrained, norm_layer=norm, **args)
    return model
