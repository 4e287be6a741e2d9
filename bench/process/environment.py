"""The machine a run uses, as recorded: devices, versions, threads and memory. None of it may change a certificate."""

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
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError

if TYPE_CHECKING:  # imported in the functions that need it: bench merge compares machines without it
    import torch

MACHINE = ("device", "platform", "packages")  # if these are equal, equal identities give equal counts
PACKAGES = ("torch", "timm", "peft", "diffusers", "numpy", "scipy", "cryptography")


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, commit, device and host, as JSON."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "certbench": _version("certbench"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": name,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "packages": {p: _version(p) for p in PACKAGES},
    }


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two environments have the same kind of machine and versions, which must give the same counts."""
    return all(one.get(k) == other.get(k) for k in MACHINE)


def _processor() -> str:
    """Return the CPU's model and torch's vector instructions, which affect the last bits of results."""
    import torch

    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        models = [v for k, _, v in (x.partition(":") for x in _lines("/proc/cpuinfo")) if k.strip() == "model name"]
        name = models[0].strip() if models else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:  # a container may hide the file
        return []


def calibration_seconds(device: torch.device) -> float:
    """Measure the seconds of a fixed small workload, by which times of other machines are scaled.

    Two 3x3 convolutions and a matrix product in float32, 24 times after a warm-up; the median, times ten.
    """
    import torch

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
    """Return the checkout's commit, with a + for uncommitted changes; None outside a checkout."""
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
    """Return the torch device of ``--device``; auto prefers an accelerator. Raises BenchError if it is missing."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name, False):
        found = ", ".join(k for k, v in available.items() if v)
        raise BenchError(f"--device {name}: not available on this machine; use one of: {found}")
    return torch.device(name)


def same_kind(device: torch.device) -> list[torch.device]:
    """Return all devices of the same kind: every visible GPU (see CUDA_VISIBLE_DEVICES), or the device itself."""
    import torch

    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def cores() -> int:
    """Return the number of cores that this process may use, which a container or a batch system may have limited."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(device: torch.device) -> int:
    """Return the number of threads that draw votes on a device, at most.

    On a CPU, torch's number of threads (``OMP_NUM_THREADS``); on a GPU, its share of the cores.
    """
    import torch

    if device.type == "cpu":
        return torch.get_num_threads()
    if device.type == "cuda":
        return gpu_threads(cores(), torch.cuda.device_count())
    return 1


def gpu_threads(cores: int, gpus: int) -> int:
    """Return the number of threads for each of the GPUs of a machine: float noise and draws are made on its CPU."""
    return max(1, min(8, cores // max(1, gpus)))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next block; a no-op with other C libraries.

    By default large blocks are returned to the system, which clears every page again: measured to take up to two fifths
    of a block's time (``tests/perf/test_engine.py``).
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # constants of malloc.h
        for parameter in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system supports it."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a container may forbid it; the peak is then that of the whole process
            return


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes since the reset: the GPU allocator's, or this process's on a CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
