"""What a run's record says of the machine it ran on: nothing here may change a certificate."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError

PACKAGES = ("torch", "timm", "peft", "diffusers", "numpy", "scipy", "cryptography")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device and host, JSON-able."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "certbench": _version("certbench"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {p: _version(p) for p in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + where it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")


def pick_device(name: str) -> torch.device:
    """The torch device of ``--device``; auto prefers an accelerator. Raises BenchError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, False):
        raise BenchError(
            f"--device {name}: not on this machine; there is {', '.join(k for k, v in there.items() if v)}"
        )
    return torch.device(name)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system allows one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a container may forbid it: the peak is then the process's
            return


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since the reset: of the accelerator's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
