"""Damaged configs of transformers beside weights that fit the undamaged ones."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from bench.data.datasets import load_card
from bench.models.names import blueprint, choose_base
from tests.fuzz.data import modest
from tests.fuzz.judging import changed, cut, cuts, dumped, edits, judge, scratch

_CONFIG: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_act": "gelu",
    "hidden_size": 4,
    "id2label": {str(i): str(i) for i in range(10)},
    "image_size": 8,
    "intermediate_size": 8,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 2,
    "num_channels": 1,
    "num_hidden_layers": 1,
    "patch_size": [4, 4],
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
}
_PROCESSOR = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5],
    "image_std": [0.25],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 8, "width": 8},
}
_LAYER = "vit.encoder.layer.0."
_LINEAR = {
    **{f"{_LAYER}attention.attention.{part}": (4, 4) for part in ("query", "key", "value")},
    f"{_LAYER}attention.output.dense": (4, 4),
    f"{_LAYER}intermediate.dense": (8, 4),
    f"{_LAYER}output.dense": (4, 8),
    "vit.embeddings.patch_embeddings.projection": (4, 1, 4, 4),
    f"{_LAYER}layernorm_before": (4,),
    f"{_LAYER}layernorm_after": (4,),
    "vit.layernorm": (4,),
    "classifier": (10, 4),
}


@given(st.just([]) | edits, st.just([]) | edits, cuts, cuts)
def transformers_folders(changes: list[Any], others: list[Any], torn: list[Any], torn_processor: list[Any]) -> None:
    """Load a folder with a damaged config.json and preprocessor_config.json."""
    config, processor = changed(_CONFIG, changes), changed(_PROCESSOR, others)
    if not modest(config):
        return
    state = {f"{name}.weight": torch.ones(shape) for name, shape in _LINEAR.items()}
    state |= {f"{name}.bias": torch.ones(shape[:1]) for name, shape in _LINEAR.items()}
    state |= {
        "vit.embeddings.cls_token": torch.ones(1, 1, 4),
        "vit.embeddings.position_embeddings": torch.ones(1, 5, 4),
    }
    with scratch() as folder:
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_bytes(cut(dumped(config), torn))
        (folder / "preprocessor_config.json").write_bytes(cut(dumped(processor), torn_processor))
        card = load_card("digits")

        def read() -> None:
            module, _ = blueprint(card, choose_base(card, card.preset, str(folder))).load()
            assert all(torch.isfinite(v).all() for v in [*module.parameters(), *module.buffers()])

        judge("transformers_folders", read)
