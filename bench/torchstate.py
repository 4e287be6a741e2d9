"""Torch's process-wide settings: they decide logits, so a plug-in that changes one would change other runs too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as modules

from bench.errors import note

_reported: set[str] = set()


def _threads_as_now(value: int) -> None:
    if torch.get_num_threads() != value:  # setting it restarts the pool
        torch.set_num_threads(value)


def _flushes() -> bool:
    return bool((torch.tensor([1e-310], dtype=torch.float64, device="cpu") * 1).item() == 0)


def _attributes(owner: Any, *names: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def put(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if getattr(owner, name) != value:
                setattr(owner, name, value)

    return lambda: {name: getattr(owner, name) for name in names if hasattr(owner, name)}, put


def _attention() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    kinds = [k for k in ("flash", "mem_efficient", "math", "cudnn") if hasattr(torch.backends.cuda, f"{k}_sdp_enabled")]

    def put(values: dict[str, bool]) -> None:
        for kind, value in values.items():
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(value)

    return lambda: {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}, put


def _hooks() -> list[dict[Any, Any]]:
    return [v for k, v in vars(modules).items() if k.startswith("_global_") and isinstance(v, dict)]


def _put_hooks(values: list[dict[Any, Any]]) -> None:
    for hooks, value in zip(_hooks(), values, strict=True):
        if hooks != value:
            hooks.clear()
            hooks.update(value)


def _autocast() -> dict[str, tuple[bool, torch.dtype]]:
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}


def _put_autocast(values: dict[str, tuple[bool, torch.dtype]]) -> None:
    for kind, (enabled, dtype) in values.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


# Name -> how it is read, and how it is set.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        torch.get_default_device,
        # None takes away what a device would put in the way of every call.
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "gradient mode": (torch.is_grad_enabled, lambda on: torch.set_grad_enabled(on)),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    ),
    "number of threads": (torch.get_num_threads, _threads_as_now),
    "precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn flags": _attributes(torch.backends.cudnn, "enabled", "benchmark", "deterministic", "allow_tf32"),
    "mkldnn flags": _attributes(torch.backends.mkldnn, "enabled"),
    "attention kernels": _attention(),
    "autocast": (_autocast, _put_autocast),
    "flushing of denormal numbers": (_flushes, lambda on: torch.set_flush_denormal(on)),
    "hooks of all modules": (lambda: [dict(hooks) for hooks in _hooks()], _put_hooks),
}


def settings() -> dict[str, Any]:
    """All settings as they are now."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def put_back(wanted: Mapping[str, Any]) -> list[str]:
    """Set all settings as wanted; the names of those that were otherwise."""
    changed = [name for name, (read, _) in _SETTINGS.items() if read() != wanted[name]]
    for name in changed:
        _SETTINGS[name][1](wanted[name])
    return changed


@contextmanager
def under(wanted: Mapping[str, Any]) -> Iterator[None]:
    """Have settings as wanted within this context."""
    before = settings()
    put_back(wanted)
    try:
        yield
    finally:
        put_back(before)


@contextmanager
def kept(name: str, doing: str) -> Iterator[None]:
    """Put back what the code of defense ``name`` changes of torch's settings, and print a note that names it.

    For one thread at a time: the settings are the process's.
    """
    before = settings()
    try:
        yield
    finally:
        changed = put_back(before)
        said = f"defense {name} changed torch's {', '.join(changed)} {doing}; put back, since all runs share it"
        if changed and said not in _reported:
            _reported.add(said)
            note(f"{said}: set it for single tensors and modules instead")
