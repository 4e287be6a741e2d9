"""What a run's record says of the machine it ran on: nothing here may change a certificate."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.errors import BenchError

MACHINE = ("device", "platform", "packages")  # where these are equal, equal identities give equal counts
PACKAGES = ("torch", "timm", "peft", "diffusers", "numpy", "scipy", "cryptography")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device and host, JSON-able."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
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


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two environments are one kind of machine with the same versions, which must give the same counts."""
    return all(one.get(k) == other.get(k) for k in MACHINE)


def _processor() -> str:
    """The CPU's model and the vector instructions torch uses, by which the last bits of a result may differ."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        models = [v for k, _, v in (x.partition(":") for x in _lines("/proc/cpuinfo")) if k.strip() == "model name"]
        name = models[0].strip() if models else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:  # a container may hide it: the architecture's name is then all that is known
        return []


def calibration_seconds(device: torch.device) -> float:
    """What a fixed small workload takes on this machine as it is loaded now: the unit of seconds elsewhere.

    Two 3x3 convolutions and a matrix product in float32, 24 times after a warm-up; the median, times ten.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 16, 16, 16, generator=generator).to(device)
    kernel = torch.randn(16, 16, 3, 3, generator=generator).to(device) / 12
    square = torch.randn(192, 192, generator=generator).to(device) / 14
    taken = []
    with torch.inference_mode():
        for _ in range(30):
            began = time.perf_counter()
            x = torch.conv2d(torch.conv2d(images, kernel, padding=1).relu(), kernel, padding=1)
            y = square @ square
            (x.sum() + y.sum()).item()  # waits for an accelerator
            taken.append(time.perf_counter() - began)
    return 10 * statistics.median(taken[6:])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + where it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).parents[2]
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


def same_kind(device: torch.device) -> list[torch.device]:
    """All devices of its kind that this process may use: every visible GPU (see CUDA_VISIBLE_DEVICES), or itself."""
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def threads(device: torch.device) -> int:
    """Return the number of threads that draw votes on a device.

    On a CPU as many as torch takes for one block (``OMP_NUM_THREADS``); for a GPU its share of the cores, up to 8,
    since noise is drawn on the CPU.
    """
    if device.type == "cpu":
        return torch.get_num_threads()
    if device.type == "cuda":
        return max(1, min(8, (os.cpu_count() or 1) // max(1, torch.cuda.device_count())))
    return 1


def keep_freed_memory() -> None:
    """Have this process keep memory that it frees, for the next block to take, where the C library can be told (glibc).

    By default large pieces go back to the system, which clears every page anew: measured to be up to two fifths of a
    block's time (``tests/perf/test_engine.py``).
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
        for parameter in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


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
