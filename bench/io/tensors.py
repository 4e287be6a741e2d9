"""Read untrusted weights: safetensors alone, never a pickle, with every name, shape and value checked."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bench.errors import BenchError, one_line
from bench.io import limits
from bench.io.hub import MissingFile

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".npz")
COUNTER = "num_batches_tracked"  # of a batch norm; not used after training
_LARGEST_INDEX = 64 * limits.MB
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIDES = 8  # maximum dimensions of a tensor; torch supports 64
# A zip (torch.save since 1.6, npz), then pickles of protocols 2 to 5 (older torch.save).
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Stored:
    """A safetensors file: its tensors by name, its metadata, and the sha256 of its bytes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def refuse_pickle(path: Path) -> None:
    """Raise BenchError where ``path`` is not a file, or is a pickle by its suffix or first bytes."""
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
            f"{path}: a pickled checkpoint, refused because reading one can run hidden code; convert it, without "
            f"running any: bench convert {path} --to {path.name.partition('.')[0] or 'model'}.safetensors"
        )


def read(path: Path) -> Stored:
    """Read the tensors of a safetensors file to the CPU. Raises BenchError for a pickle or a corrupt file."""
    refuse_pickle(path)
    if (size := path.stat().st_size) > (most := limits.memory()):
        raise BenchError(
            f"{path}: {size / 1e9:.1f} GB do not fit into {most / 1e9:.1f} GB of memory; use a larger machine"
        )
    try:
        with path.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        with safe_open(path, framework="pt") as file:
            stored = Stored({k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}, sha256)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, struct.error) as e:  # RuntimeError: impossible shapes
        raise BenchError(
            f"{path}: corrupt or incomplete safetensors file: {one_line(e)}; save or fetch it again"
        ) from None
    if not stored.tensors:
        raise BenchError(f"{path}: no tensors in it; give the file with the weights")
    for key, value in stored.tensors.items():
        if value.is_complex() or (value.is_floating_point() and value.dtype not in _FLOATS):
            raise BenchError(f"{path}: {key} is {value.dtype}; save it as float32, float16 or bfloat16")
        if value.ndim > _SIDES:
            raise BenchError(f"{path}: {key} has {value.ndim} dimensions; a layer's weights have at most {_SIDES}")
        finite = not value.is_floating_point() or not value.numel() or torch.isfinite(value.float()).all()
        if not finite:  # in float32, as the model computes
            raise BenchError(f"{path}: {key} has values that are not finite in float32; train or convert it again")
    return stored


def metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file. Raises BenchError for a pickle or a corrupt file."""
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise BenchError(
            f"{path}: corrupt or incomplete safetensors file: {one_line(e)}; save or fetch it again"
        ) from None


def read_stored(stem: str, fetch: Callable[[str], Path]) -> tuple[Stored, str]:
    """Read the weights called ``stem`` from one safetensors file, or from the shards of an index.

    Where full precision is missing, the variants fp16 and bf16 of diffusers and transformers are read, which are the
    same weights, rounded. Variants of other names may be other weights.

    Args:
        stem: The file's name without suffix, such as "model".
        fetch: Returns the local path of a file of the folder or repository; raises MissingFile where there is none.

    Returns:
        The tensors, and the name of the file or index.

    Raises:
        BenchError: There is no such file, or it cannot be read.
    """
    failed: list[BenchError] = []
    for variant in ("", ".fp16", ".bf16"):
        for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
            try:
                path = fetch(name)
            except BenchError as e:  # not only MissingFile: offline, a missing file cannot be recognised
                failed.append(e)
                continue
            return (_read_shards(path, fetch) if name.endswith(".json") else read(path)), name
    raise next((e for e in failed if not isinstance(e, MissingFile)), failed[0])


def _read_shards(index: Path, fetch: Callable[[str], Path]) -> Stored:
    """Read all shards of an index; the sha256 is that of the shards' hashes."""
    try:
        places = dict(json.loads(limits.contents(index, _LARGEST_INDEX))["weight_map"])
        names = sorted(set(places.values()))
        plain = all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise BenchError(f"{index}: not an index of safetensors shards: {one_line(e)}; save the model again") from None
    if not names or not plain:
        raise BenchError(f"{index}: must name .safetensors files of its own folder; save the model again")
    merged: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name in names:
        shard = read(fetch(name))
        wanted = {key for key, place in places.items() if place == name}
        if wrong := sorted(wanted ^ set(shard.tensors)):
            raise BenchError(
                f"{index} and {name} disagree on {wrong[0]}, which only one of them has; save the model again"
            )
        merged |= shard.tensors
        digest.update(shard.sha256.encode())
    return Stored(merged, {}, digest.hexdigest())


def mismatches(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], may_miss: Collection[str] = ()) -> list[str]:
    """List why ``given`` cannot replace ``wanted``, one phrase for each key; empty where it can."""
    wrong = [
        f"{k} has shape {list(v.shape)}, the model's has {list(wanted[k].shape)}"
        for k, v in given.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    wrong += [
        f"{k} is {v.dtype}, the model's is {wanted[k].dtype}: quantised or cast weights; save it as float32"
        for k, v in given.items()
        if k in wanted and v.is_floating_point() != wanted[k].is_floating_point() and not k.endswith(COUNTER)
    ]
    wrong += [f"{k} is unknown to the model" for k in given if k not in wanted]
    return wrong + [f"{k} is missing" for k in wanted if k not in given and k not in may_miss]


def check(what: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], may_miss: Collection[str] = ()) -> None:
    """Raise BenchError beginning with ``what`` and naming the first key that does not fit."""
    wrong = mismatches(wanted, given, may_miss)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise BenchError(f"{what}: {wrong[0]}{more}{prefix_hint(given, wanted.keys() - set(may_miss))}")


def prefix_hint(given: Collection[str], wanted: Collection[str]) -> str:
    """Return a hint for a message where ``given`` has every wanted name behind one prefix; else an empty string.

    Wrappers add prefixes: DataParallel "module.", torch.compile "_orig_mod.", Lightning "model.", transformers
    "timm_model.".
    """
    some = next(iter(wanted), "")
    found = (name.removesuffix(some) for name in given if some and name.endswith(f".{some}"))
    prefix = next((p for p in found if all(f"{p}{name}" in given for name in wanted)), "")
    if not prefix:
        return ""
    command = (
        f"from safetensors.torch import load_file, save_file; f = 'model.safetensors'; "
        f"save_file({{k.removeprefix('{prefix}'): v for k, v in load_file(f).items() if k.startswith('{prefix}')}}, f)"
    )
    return f'; all names have the prefix {prefix!r} of a wrapper; remove it: python -c "{command}"'
