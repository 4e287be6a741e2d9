"""Process-wide state that decides logits: the global random generators and torch's settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as modules

from bench.errors import note

_reported: set[str] = set()


@contextmanager
def fixed_rng(*key: int) -> Iterator[None]:
    """Seed torch, numpy and Python by ``key`` within this context, then restore their states.

    A defense is built, trained, loaded and merged within it, so that the shards, workers and resumes of a run
    hold the same classifier even if it takes randomness from a global generator.
    """
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(key).generate_state(3, np.uint64).tolist()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed >> 1)
        np.random.seed(numpy_seed % 2**32)
        random.seed(python_seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _set_threads(value: int) -> None:
    if torch.get_num_threads() != value:  # setting it restarts the thread pool
        torch.set_num_threads(value)


def _flushes() -> bool:
    return bool((torch.tensor([1e-310], dtype=torch.float64, device="cpu") * 1).item() == 0)


def _attributes(owner: Any, *names: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def write(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if getattr(owner, name) != value:
                setattr(owner, name, value)

    return lambda: {name: getattr(owner, name) for name in names if hasattr(owner, name)}, write


def _attention() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    kinds = [k for k in ("flash", "mem_efficient", "math", "cudnn") if hasattr(torch.backends.cuda, f"{k}_sdp_enabled")]

    def write(values: dict[str, bool]) -> None:
        for kind, value in values.items():
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(value)

    return lambda: {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}, write


def _hooks() -> list[dict[Any, Any]]:
    return [v for k, v in vars(modules).items() if k.startswith("_global_") and isinstance(v, dict)]


def _set_hooks(values: list[dict[Any, Any]]) -> None:
    for hooks, value in zip(_hooks(), values, strict=True):
        if hooks != value:
            hooks.clear()
            hooks.update(value)


def _autocast() -> dict[str, tuple[bool, torch.dtype]]:
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}


def _set_autocast(values: dict[str, tuple[bool, torch.dtype]]) -> None:
    for kind, (enabled, dtype) in values.items():
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


# Name -> functions that read and set it.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        torch.get_default_device,
        # A device, even the CPU, slows every call down; None does not.
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "gradient mode": (torch.is_grad_enabled, lambda on: torch.set_grad_enabled(on)),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    ),
    "number of threads": (torch.get_num_threads, _set_threads),
    "precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn flags": _attributes(torch.backends.cudnn, "enabled", "benchmark", "deterministic", "allow_tf32"),
    "mkldnn flags": _attributes(torch.backends.mkldnn, "enabled"),
    "attention kernels": _attention(),
    "autocast": (_autocast, _set_autocast),
    "flushing of denormal numbers": (_flushes, lambda on: torch.set_flush_denormal(on)),
    "hooks of all modules": (lambda: [dict(hooks) for hooks in _hooks()], _set_hooks),
}


def torch_settings() -> dict[str, object]:
    """Return all settings by name."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def set_torch_settings(wanted: Mapping[str, object]) -> list[str]:
    """Set all settings; return the names of those that changed."""
    changed = [name for name, (read, _) in _SETTINGS.items() if read() != wanted[name]]
    for name in changed:
        _SETTINGS[name][1](wanted[name])
    return changed


@contextmanager
def using_torch_settings(wanted: Mapping[str, object]) -> Iterator[None]:
    """Use these settings within this context, then restore those before."""
    before = torch_settings()
    set_torch_settings(wanted)
    try:
        yield
    finally:
        set_torch_settings(before)


@contextmanager
def restored_torch_settings(name: str, doing: str) -> Iterator[None]:
    """Restore the settings that the code of defense ``name`` changes, and print a note that names it.

    For one thread at a time, since the process has only one set of settings.
    """
    before = torch_settings()
    try:
        yield
    finally:
        changed = set_torch_settings(before)
        text = f"defense {name} changed torch's {', '.join(changed)} {doing}; restored, because all runs share it"
        if changed and text not in _reported:
            _reported.add(text)
            note(f"{text}: set it on single tensors or modules instead")
