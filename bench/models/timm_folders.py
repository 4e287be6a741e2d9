"""Write a base's function as timm keeps models: config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from bench.io.files import write_json
from bench.models.base import Classifier, LocalBase

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def config_of(
    base: LocalBase, module: Classifier, shape: tuple[int, int, int], classes: Sequence[str]
) -> dict[str, Any]:
    """Return timm's config of ``module``, a model of the base's architecture, for images of ``shape``."""
    stated = base.meta["preprocessing"]
    mean = module.mean.flatten().tolist()
    return {
        "architecture": base.architecture["architecture"].partition(".")[0],  # the tag names other weights
        "num_classes": len(classes),
        "model_args": base.architecture["args"],
        "label_names": list(classes),
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [len(mean), *(module.size or shape[1:])],
            "interpolation": stated["resampling"] or "bilinear",
            "crop_pct": 1.0,  # the card's images are resized whole
            "mean": mean,
            "std": module.std.flatten().tolist(),
        },
    }


def write(module: Classifier, config: dict[str, Any], weights: Path, described: Path) -> None:
    """Write the tensors of the timm model inside ``module``, and the config. Raises OSError."""
    state = module.model.state_dict()
    # Clones, since safetensors refuses tensors that share memory (tied weights).
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, weights, metadata={"format": "pt"})
    write_json(described, config)
