"""Reading weights other people made: safetensors only, never a pickle, and every shape checked."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bench import limits
from bench.errors import BenchError, one_line

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".npz")
# A zip (torch.save since 1.6, npz), then pickles of protocol 2 to 5 (torch.save before that).
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIDES = 8  # dimensions of a tensor, of which torch can compute with 64
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Stored:
    """A safetensors file: its tensors by name, its metadata, and the sha256 of its bytes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def refuse_pickle(path: Path) -> None:
    """Raise BenchError unless ``path`` is a file that can be safetensors: by its suffix, and by its first bytes."""
    if not path.is_file():
        raise BenchError(f"no file {path}")
    try:
        with path.open("rb") as f:
            start = f.read(9)
    except OSError as e:
        raise BenchError(f"{path}: cannot be read: {e.strerror}") from None
    # Bytes 0x80 0x02 also begin a safetensors header of 640 bytes; its ninth byte is the JSON's brace.
    if path.suffix in PICKLED or (start.startswith(_MAGIC) and start[8:] != b"{"):
        raise BenchError(
            f"{path}: a pickled checkpoint, refused because opening one can run code hidden in it; where you trust it, "
            f'convert it: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
        )


def read(path: Path) -> Stored:
    """The tensors of a safetensors file, on the CPU. Raises BenchError for a pickle or a corrupt file."""
    refuse_pickle(path)
    if (size := path.stat().st_size) > (most := limits.memory()):
        raise BenchError(
            f"{path}: {size / 1e9:.1f} GB, and there are {most / 1e9:.1f} GB of memory; use a larger machine"
        )
    try:
        with path.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        with safe_open(path, framework="pt") as file:
            stored = Stored({k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}, sha256)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, struct.error) as e:  # torch's: shapes it cannot have
        raise BenchError(f"{path}: not a whole safetensors file: {one_line(e)}") from None
    if not stored.tensors:
        raise BenchError(f"{path}: holds no tensors")
    for key, value in stored.tensors.items():
        if value.is_complex() or (value.is_floating_point() and value.dtype not in _FLOATS):
            raise BenchError(f"{path}: {key} holds {value.dtype}; save it as float32, float16 or bfloat16")
        if value.ndim > _SIDES:
            raise BenchError(f"{path}: {key} has {value.ndim} dimensions; no layer's weights have more than {_SIDES}")
        finite = not value.is_floating_point() or not value.numel() or torch.isfinite(value.float()).all()
        if not finite:  # as the model will have them
            raise BenchError(f"{path}: {key} holds values that are not finite in float32")
    return stored


def mismatches(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], may_miss: Collection[str] = ()) -> list[str]:
    """What keeps ``given`` from being loaded where ``wanted`` is; one phrase a key, empty where all fits."""
    wrong = [
        f"{k} has shape {list(v.shape)}, the model's has {list(wanted[k].shape)}"
        for k, v in given.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    wrong += [f"{k} is unknown to the model" for k in given if k not in wanted]
    return wrong + [f"{k} is missing" for k in wanted if k not in given and k not in may_miss]


def check(what: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], may_miss: Collection[str] = ()) -> None:
    """Raise BenchError beginning with ``what`` and naming the first key that does not fit."""
    wrong = mismatches(wanted, given, may_miss)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise BenchError(f"{what}: {wrong[0]}{more}")
