"""The flags with which improved- and guided-diffusion models are published, and the network they describe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError, unknown

# Defaults of both repositories' image_train.py; None: must be given, since a wrong one would go unnoticed.
_DEFAULTS: dict[str, str | None] = {
    "image_size": None,
    "diffusion_steps": None,
    "noise_schedule": None,
    "num_channels": "128",
    "num_res_blocks": "2",
    "channel_mult": "",
    "num_heads": "4",
    "num_head_channels": "-1",
    "num_heads_upsample": "-1",
    "attention_resolutions": "16,8",
    "learn_sigma": "False",
    "class_cond": "False",
    "use_scale_shift_norm": "True",
    "resblock_updown": "False",
    "use_new_attention_order": "False",
    "predict_xstart": "False",
    "timestep_respacing": "",
}
_NO_EFFECT = ("dropout", "use_checkpoint", "use_fp16", "use_kl", "sigma_small", "rescale_learned_sigmas")
# Flags of guided-diffusion alone, which does not rescale timesteps by default; improved-diffusion does.
_GUIDED = ("channel_mult", "num_head_channels", "resblock_updown", "use_fp16", "use_new_attention_order")
_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


@dataclass(frozen=True)
class Structure:
    """The network that flags describe."""

    size: int
    channels: int  # of the first level
    mult: tuple[int, ...]  # of each level, in units of channels
    blocks: int  # residual blocks of a level
    attention: tuple[bool, ...]  # of each level
    head: int  # channels of an attention head
    resnet_sampling: bool  # residual blocks change the resolution, else convolutions
    scale_shift: bool
    split_heads_last: bool  # the qkv order of "use_new_attention_order"
    out: int  # 6: with learned variance


@dataclass(frozen=True)
class Published:
    """All that the flags of a diffusion model state."""

    net: Structure
    heads_stated: bool  # False: 4 heads by default
    steps: int
    schedule: str  # linear or cosine
    clean: bool  # it predicts the clean image, else the noise
    scale: float  # by which the network's timesteps are multiplied


def published(file: Path, text: str) -> Published:
    """Read the flags of a model. Raises BenchError where one is unknown, missing or cannot be converted."""
    given = _flags(file, text)
    value = {**{k: v or "" for k, v in _DEFAULTS.items()}, **given}
    schedule, steps = value["noise_schedule"], _whole(value, "diffusion_steps")
    if schedule not in ("linear", "cosine"):
        raise unknown("noise_schedule in --flags", schedule, ("linear", "cosine"))
    return Published(
        net=_structure(file, value),
        heads_stated=bool(given.keys() & {"num_heads", "num_head_channels"}),
        steps=steps,
        schedule=schedule,
        clean=_yes(value, "predict_xstart"),
        scale=_timestep_scale(given, steps),
    )


def _flags(file: Path, text: str) -> dict[str, str]:
    """Parse published flags. Raises BenchError for unknown ones, or where one that decides results is missing."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise BenchError(f"--flags: {e}") from None
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    names, values = words[::2], words[1::2]
    if len(words) % 2 or not all(name.startswith("--") for name in names):
        raise BenchError(f"--flags {text!r}: write each as --name value, in one pair of quotes")
    given = dict(zip((name.removeprefix("--") for name in names), values, strict=True))
    for name in given:
        if name not in (*_DEFAULTS, *_NO_EFFECT, "rescale_timesteps"):
            raise unknown("model or diffusion flag", name, (*_DEFAULTS, *_NO_EFFECT, "rescale_timesteps"))
    missing = [name for name, default in _DEFAULTS.items() if default is None and name not in given]
    if missing:
        raise BenchError(
            f"{file}: a diffusion model, whose file does not tell its {', '.join(missing)}; give the "
            'flags of its authors for both: --flags "--image_size 32 --diffusion_steps 4000 --noise_schedule cosine"'
        )
    if given.get("timestep_respacing"):
        raise BenchError("--flags: timestep_respacing is for sampling; leave it out")
    return given


def _structure(file: Path, value: Mapping[str, str]) -> Structure:
    size, channels = _whole(value, "image_size"), _whole(value, "num_channels")
    mult: tuple[float, ...] = tuple(_list(value, "channel_mult")) or _MULT.get(size, ())
    if not mult:
        raise BenchError(f"--flags: image_size {size} has no default channel_mult; add --channel_mult")
    if mult[0] != 1 or _yes(value, "class_cond"):
        problem = "class_cond True" if _yes(value, "class_cond") else f"channel_mult {mult[0]:g} of the first level"
        raise BenchError(f"{file}: {problem} cannot be converted: diffusers' UNet2DModel has no counterpart")
    attention = tuple(size // r for r in _list(value, "attention_resolutions"))
    levels = tuple(2**level in attention for level in range(len(mult)))
    widths = [int(m) * channels for m, here in zip(mult, (*levels[:-1], True), strict=True) if here]  # the middle's too
    per_head, heads = int(value["num_head_channels"]), _whole(value, "num_heads")
    if value["num_heads_upsample"] not in ("-1", str(heads)):
        raise BenchError(f"{file}: num_heads_upsample differs from num_heads; UNet2DModel has no counterpart")
    sizes = {per_head} if per_head > 0 else {width // heads for width in widths}
    if len(sizes) > 1:
        raise BenchError(
            f"{file}: {heads} heads of different sizes ({', '.join(map(str, sorted(sizes)))} channels) cannot be "
            f"converted: diffusers' UNet2DModel has one size"
        )
    return Structure(
        size=size,
        channels=channels,
        mult=tuple(map(int, mult)),
        blocks=_whole(value, "num_res_blocks"),
        attention=levels,
        head=sizes.pop(),
        resnet_sampling=_yes(value, "resblock_updown"),
        scale_shift=_yes(value, "use_scale_shift_norm"),
        split_heads_last=_yes(value, "use_new_attention_order"),
        out=6 if _yes(value, "learn_sigma") else 3,
    )


def _timestep_scale(given: Mapping[str, str], steps: int) -> float:
    """Return the factor of the network's timesteps. Raises BenchError where the repositories' defaults differ."""
    if steps != 1000 and "rescale_timesteps" not in given and any(name in given for name in _GUIDED):
        raise BenchError(
            f"--flags: {steps} diffusion_steps: state --rescale_timesteps True or False, since the default of "
            f"improved-diffusion is True and that of guided-diffusion False"
        )
    return 1000 / steps if _yes({"rescale_timesteps": "True", **given}, "rescale_timesteps") else 1.0


def _whole(value: Mapping[str, str], name: str) -> int:
    text = value[name]
    if not text.isdecimal() or not 0 < int(text) <= 10**6:
        raise BenchError(f"--flags: {name} {text!r}: must be a whole number above 0")
    return int(text)


def _list(value: Mapping[str, str], name: str) -> list[int]:
    words = [w for w in value[name].split(",") if w]
    if not all(w.strip().isdecimal() and int(w) for w in words):
        raise BenchError(f"--flags: {name} {value[name]!r}: must be whole numbers with commas between")
    return [int(w) for w in words]


def _yes(value: Mapping[str, str], name: str) -> bool:
    text = value[name].lower()
    if text not in ("true", "false"):
        raise BenchError(f"--flags: {name} {value[name]!r}: must be True or False")
    return text == "true"
