"""Read pickled checkpoints for ``bench convert``, weights only: the one place that opens other people's pickles."""

from __future__ import annotations

import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.errors import BenchError, one_line
from bench.io import limits

_STATE = "state_dict"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, and what it held beside them."""

    tensors: dict[str, Tensor]
    entry: str  # name of the entry that held them; empty: the checkpoint itself
    dropped: list[str]  # descriptions of its other entries


def read(path: Path) -> Checkpoint:
    """Read the tensors of a checkpoint to the CPU; nothing in it is executed.

    Raises BenchError where the file is no checkpoint, needs more than tensors and plain values, is larger than memory,
    or has no or several sets of weights.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as e:
        raise BenchError(f"{path}: cannot be read: {e.strerror}") from None
    if not regular:
        raise BenchError(f"{path}: not a regular file; give the checkpoint's file")
    if path.suffix == ".safetensors":
        raise BenchError(f"{path}: already safetensors; use it as it is")
    _check_size(path, _unpacked_size(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises errors of many types for corrupt files
        if found := re.search(r"GLOBAL ([\w.]+)|Unsupported (?:class|operand) (\S+)", str(e)):
            raise BenchError(
                f"{path}: needs {found[1] or found[2]} to be read, which is more than tensors and plain values; it is "
                f"refused, since that can run hidden code: save only its state_dict where it was made"
            ) from None
        why = one_line(e)[:200] or type(e).__name__
        raise BenchError(f"{path}: not a checkpoint of torch.save, or incomplete: {why}; fetch it again") from None
    found_in = _weights(path, loaded)
    _check_size(path, sum(v.numel() * v.element_size() for v in found_in.tensors.values()))  # views may repeat values
    # Copies, since several names may share memory, which safetensors cannot store.
    copies = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in found_in.tensors.items()}
    return Checkpoint(copies, found_in.entry, found_in.dropped)


def _unpacked_size(path: Path) -> int:
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())  # a deflated entry may be any size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as e:
        raise BenchError(f"{path}: corrupt or incomplete: {one_line(e)}; fetch it again") from None


def _check_size(path: Path, size: int) -> None:
    if size > (most := limits.memory()):
        raise BenchError(
            f"{path}: {size / 1e9:.1f} GB do not fit into {most / 1e9:.1f} GB of memory; use a larger machine"
        )


def _weights(path: Path, loaded: Any) -> Checkpoint:
    """Find the only set of weights. Raises BenchError where there is none, or where there are several."""
    if not isinstance(loaded, Mapping):
        raise BenchError(f"{path}: holds a {type(loaded).__name__}, no weights by name; save the model's state_dict")
    if _are_weights(loaded):
        return Checkpoint(dict(loaded), "", [])
    sets = {str(k): dict(v) for k, v in loaded.items() if isinstance(v, Mapping) and _are_weights(v)}
    chosen = _STATE if _STATE in sets else next(iter(sets), "")
    if not sets or (len(sets) > 1 and chosen != _STATE):
        problem = f"several sets of weights ({', '.join(sets)})" if sets else "no set of weights"
        raise BenchError(
            f"{path}: {problem} among its entries {', '.join(_described(loaded))}; save the right state_dict alone"
        )
    others = {k: v for k, v in loaded.items() if k != chosen}
    return Checkpoint(sets[chosen], chosen, list(_described(others)))


def _are_weights(value: Mapping[Any, Any]) -> bool:
    """Whether all values are dense tensors with a name."""
    return bool(value) and all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided and not v.is_quantized
        for k, v in value.items()
    )


def _described(entries: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in entries.items():
        short = isinstance(value, str | int | float | bool)
        yield f"{key} ({value!r:.60})" if short else str(key)
