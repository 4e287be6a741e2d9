"""Read and write the folders of the peft library: LoRA adapters of a timm model.

``adapter_config.json`` states rank, scale and adapted layers, ``adapter_model.safetensors`` has the adapters, and the
head where it was trained too. Both are untrusted input. A setting that would make another function than the defense's
is refused, since peft ignores nothing silently either.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import BenchError, shown
from bench.io import tensors
from bench.models.timm_configs import read_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name in the file
_FROZEN = "certbench_base_sha256"  # metadata: hash of the tensors that the folder does not have
_ADAPTER = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save"}
# These choose layers, which the tensors name too; or matter only in training, or to other libraries.
_HARMLESS = {
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode", "task_type"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"),
    "runtime_config",
}
_PLAIN_STARTS = (True, False, None, "gaussian")  # other initialisations also change the base's weights
_TOLERANCE = 1e-4  # of the largest logit; fused and merged products are rounded in another order
_NOTHING: tuple[Any, ...] = (None, False, "none", 0, [], {})


class FolderWeights(ABC):
    """A defense whose weights a folder of another library can hold."""

    @classmethod
    @abstractmethod
    def folder_settings(cls, folder: Path) -> dict[str, Any]:
        """Return the values of Config that the folder states. Raises BenchError where it cannot be read."""

    @abstractmethod
    def read_folder(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """Return the folder's tensors by their names in the built, unmerged defense, and the sha256 of their file.

        Raises BenchError where a tensor is missing, or is not used.
        """

    @abstractmethod
    def write_folder(self, folder: Path, base: str, head: bool) -> None:
        """Write the loaded, unmerged defense into an empty folder.

        Args:
            folder: An existing folder.
            base: Name of the base, for the reader.
            head: Whether to include the head, though it is the base's.

        Raises:
            BenchError: The other library would compute other logits from it.
        """


@dataclass(frozen=True)
class PeftFolder:
    """A folder as read: settings of the defense, and tensors by their names in the timm model."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str  # of the file of the tensors
    frozen: str | None  # hash of the base's other tensors; None: not stated
    base: str  # name of the base; empty: not stated

    def remark(self, folder: Path) -> str:
        """Describe what was read, and what had to be assumed."""
        parts = [f"{', '.join(f'{k}={v}' for k, v in self.settings.items())} from {folder.absolute().name}/{CONFIG}"]
        if self.frozen is None:
            parts.append(f"it does not state the weights of its base (it names {shown(self.base) or 'none'})")
        if half := {str(v.dtype).removeprefix("torch.") for v in self.tensors.values()} - {"float32"}:
            parts.append(f"stored as {' and '.join(sorted(half))}, computed in float32")
        if self.settings["head"]:
            parts.append("the classes of its head are assumed to be in the card's order")
        return "; ".join(parts)


def read(folder: Path) -> PeftFolder:
    """Read a folder. Raises BenchError where it is incomplete, or has an adapter that the defense cannot compute."""
    where = f"--weights {folder}"
    if not (folder / CONFIG).is_file():
        raise BenchError(f"{where} has no {CONFIG}: give a folder of peft's save_pretrained, or a .safetensors file")
    if not (folder / WEIGHTS).is_file():
        fix = "save it again with model.save_pretrained(FOLDER, safe_serialization=True)"
        raise BenchError(f"{where} has no {WEIGHTS}, and pickles are refused; {fix}")
    config = read_config(folder / CONFIG, where)
    merged = "merge it (peft's merge_and_unload), save the model as safetensors, and give that as --base"
    if config.get("peft_type") != "LORA":
        raise BenchError(f"{where}: peft_type {shown(str(config.get('peft_type')))} is not LORA; {merged}")
    for key, value in config.items():
        plain = value in _PLAIN_STARTS if key == "init_lora_weights" else value in _NOTHING
        if key not in _READ | _HARMLESS and not plain:
            raise BenchError(f"{where}: {CONFIG} sets {shown(f'{key}={value}'):.80}, which lora cannot take; {merged}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise BenchError(f"{where}: r in {CONFIG} must be a whole number from 1, not {shown(str(rank)):.40}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BenchError(f"{where}: lora_alpha in {CONFIG} must be a number, not {shown(str(alpha)):.40}")
    if odd := next((k for k in ("use_dora", "use_rslora") if config.get(k) not in (None, True, False)), None):
        raise BenchError(f"{where}: {odd} in {CONFIG} must be true or false")
    stored = tensors.read(folder / WEIGHTS)
    found = {_plain_name(k): v for k, v in stored.tensors.items()}
    if odd := next((k for k in stored.tensors if not k.startswith(_PREFIX)), None):
        raise BenchError(f"{where}: {shown(odd)} in {WEIGHTS} is not a tensor of peft, whose names begin {_PREFIX}")
    layers = sorted({m[1] for k in found if (m := _ADAPTER.fullmatch(k))})
    if not layers:
        raise BenchError(f"{where}: {WEIGHTS} has no LoRA adapter (lora_A); {merged}")
    settings = {
        "rank": rank,
        "lora_alpha": float(alpha),
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "targets": "layers:" + "+".join(_words(config, layers)),
        "head": bool(config.get("modules_to_save")),
    }
    if _is_qv(settings, found, layers):
        settings |= {"targets": "qv", "rank": rank // 2, "lora_alpha": alpha / 2}
        found = split_qv(found)
    return PeftFolder(
        settings, found, stored.sha256, stored.metadata.get(_FROZEN), str(config.get("base_model_name_or_path") or "")
    )


def _plain_name(name: str) -> str:
    """Return a tensor's name in the timm model; peft has named DoRA's norms in two ways."""
    return re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", name.removeprefix(_PREFIX))


def _words(config: Mapping[str, Any], layers: Sequence[str]) -> Sequence[str]:
    """Return names, or ends of names, of the adapted layers: the config's own, else all layers that have tensors."""
    words = config.get("target_modules")
    chosen = any(config.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    plain = isinstance(words, list) and words and all(isinstance(w, str) and re.fullmatch(r"[\w.]+", w) for w in words)
    return sorted(words) if plain and not chosen else layers  # type: ignore[arg-type]


# Query and value of a fused projection ----------------------------------------------------------------


def fuse_qv(found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write the adapters of q and v as one adapter of the fused projection, of twice the rank.

    A stacks those of q and v; B has theirs in the rows of q and v, and zeros elsewhere. So the fused product is theirs,
    for the same scale (lora_alpha doubles too), and the key is unchanged.

    Args:
        found: Tensors under the names NAME.q.lora_A.weight, ...
        weights: The base's fused weights under the names NAME.weight: DoRA's norms of the key's rows are theirs.
    """
    fused = {k: v for k, v in found.items() if not re.search(r"\.[qv]\.lora_", k)}
    for name in [k.removesuffix(".q.lora_A.weight") for k in found if k.endswith(".q.lora_A.weight")]:
        (qa, va), (qb, vb) = ([found[f"{name}.{part}.lora_{m}.weight"] for part in "qv"] for m in "AB")
        fused[f"{name}.lora_A.weight"] = torch.cat((qa, va))
        key = qb.new_zeros(len(weights[f"{name}.weight"]) - len(qb) - len(vb), len(qa) + len(va))
        rows = (torch.cat((qb, torch.zeros_like(qb)), 1), key, torch.cat((torch.zeros_like(vb), vb), 1))
        fused[f"{name}.lora_B.weight"] = torch.cat(rows)
        if f"{name}.q.lora_magnitude_vector" in found:
            norms = torch.linalg.norm(weights[f"{name}.weight"].detach(), dim=1).to(qb)
            norms[: len(qb)] = found[f"{name}.q.lora_magnitude_vector"]
            norms[-len(vb) :] = found[f"{name}.v.lora_magnitude_vector"]
            fused[f"{name}.lora_magnitude_vector"] = norms
    return fused


def split_qv(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``fuse_qv``, for adapters without DoRA."""
    split: dict[str, Tensor] = {}
    for name, value in found.items():
        layer, adapter, matrix = name.partition(".lora_")
        if not adapter:
            split[name] = value
            continue
        first, rest = value.chunk(2) if matrix == "A.weight" else (value.chunk(3)[0], value.chunk(3)[2])
        if matrix == "B.weight":
            first, rest = first.chunk(2, 1)[0], rest.chunk(2, 1)[1]
        split |= {f"{layer}.q.lora_{matrix}": first.contiguous(), f"{layer}.v.lora_{matrix}": rest.contiguous()}
    return split


def _is_qv(settings: Mapping[str, Any], found: Mapping[str, Tensor], layers: Sequence[str]) -> bool:
    """Return whether ``fuse_qv`` has made these adapters, so that query and value can be taken apart again."""
    rank = settings["rank"]
    if settings["dora"] or settings["rslora"] or rank % 2 or not all(name.endswith("qkv") for name in layers):
        return False
    for name in layers:
        a, b = found.get(f"{name}.lora_A.weight"), found.get(f"{name}.lora_B.weight")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank or len(b) % 3:
            return False
        q, k, v = b.chunk(3)
        if any(part.any() for part in (q[:, rank // 2 :], k, v[:, : rank // 2])):
            return False
    return True


# Writing ----------------------------------------------------------------------------------------------


def frozen_sha256(base: nn.Module, without: Collection[str] = ()) -> str:
    """Return the hash of a base's tensors and input size, without the tensors of the timm model named ``without``."""
    left_out = {f"model.{name}" for name in without}
    h = hashlib.sha256(repr(getattr(base, "size", None)).encode())
    for key, value in sorted(base.state_dict().items()):
        if key not in left_out and not key.endswith(tensors.COUNTER):
            h.update(f"|{key}|{value.dtype}|{tuple(value.shape)}|".encode())
            h.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def write(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], base: nn.Module, check: tuple[Tensor, Tensor]
) -> None:
    """Write the two files, and load them with peft.

    Args:
        folder: An existing folder.
        config: Arguments of peft's LoraConfig.
        state: Tensors by their names in the timm model.
        base: A private copy of the base, from pixels to logits, with the timm model as ``model``.
        check: Pixels, and the logits that peft must compute from them.

    Raises:
        BenchError: It computes other logits.
    """
    import peft  # here, since a base is loaded without it

    frozen = frozen_sha256(base, state)
    peft.LoraConfig(**config).save_pretrained(str(folder))
    named = {f"{_PREFIX}{k}": v.detach().cpu().clone().contiguous() for k, v in state.items()}
    # One key alone: safetensors writes several in random order, and equal adapters are to be equal files.
    save_file(named, folder / WEIGHTS, metadata={_FROZEN: frozen})
    x, wanted = check
    base.model = peft.PeftModel.from_pretrained(base.model, str(folder))  # type: ignore[arg-type]
    apart = float((base.eval()(x) - wanted).abs().max() / wanted.abs().max())
    if not apart <= _TOLERANCE:
        raise BenchError(
            f"peft computes other logits from a folder of these adapters, by {apart:.2g} of the largest; write them "
            f"merged: --merged"
        )


def names_of(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """Return target_modules by which peft adapts exactly these layers of the model: short ends of names if possible."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    matched = {n for n, _ in model.named_modules() if any(n == end or n.endswith(f".{end}") for end in ends)}
    return ends if matched == set(layers) else "|".join(map(re.escape, sorted(layers)))
