"""Commands in processes of their own, to be killed, starved or raced.

Each is forked from one server that has imported what the commands need, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *(
            "pytest",
            "bench.cli",
            "bench.runs.session",
            "bench.process.console",
            "bench.report.output",
            "bench.compare.baseline",
            "bench.cli.github",
        ),
        *("sklearn.datasets", "timm", "tabulate", "defenses.full", "defenses.none"),
        *("matplotlib.pyplot", *(f"matplotlib.backends.backend_{kind}" for kind in ("agg", "svg", "pdf"))),
    ]
)
Commands = Sequence[Sequence[str]]


def start(function: Callable[..., None], *args: Any, cache: Path, log: Path) -> ForkServerProcess:
    """Call a function of this module in a new process, its output in the file ``log``. One thread computes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the server: a fork from several threads may hang
    process = _server.Process(target=_child, args=(function, args, cache, log), daemon=True)
    process.start()
    return process


def _child(function: Callable[..., None], args: tuple[Any, ...], cache: Path, log: Path) -> None:
    os.environ["CERTBENCH_CACHE"] = str(cache)
    to = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(to, stream)
    import torch

    from bench.training import loop

    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 0.05
    function(*args)


def code(command: Sequence[str]) -> int:
    """The exit code of one command, run here."""
    from bench.cli import main

    try:
        main(list(command))
    except SystemExit as stop:
        return int(stop.code or 0)
    raise AssertionError("main returns nothing")


def run(commands: Commands) -> None:
    """The commands one after the other, up to the first that fails."""
    for command in commands:
        if failed := code(command):
            sys.exit(failed)


def impatient(command: Sequence[str]) -> None:
    """A command whose watchdog ends the process soon after it has asked the main thread to stop."""
    from bench.process import watchdog

    watchdog.GRACE = 0.5
    sys.exit(code(command))


def with_small_files(command: Sequence[str], out: Path, limit: int) -> None:
    """A command that may write files of no more than ``limit`` bytes: exit 2; then without a limit."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most[1]))
    assert code(command) == 2
    before = whole_lines(out)
    assert before  # some images were certified, the next did not fit
    resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert code(command) == 0
    assert whole_lines(out)[: len(before)] == before


def on_a_small_disk(command: Sequence[str], out: Path, disk: Path, sizes: Sequence[int], keep: Path) -> None:
    """The command again and again while ``disk`` grows by and by: exit 2 until all fits. ``keep``: where runs end."""
    import shutil

    _private_mounts()
    _mount("tmpfs", disk, "tmpfs", 0, f"size={sizes[0]}k")
    done: list[str] = []
    for size in sizes:
        _mount("tmpfs", disk, "tmpfs", _REMOUNT, f"size={size}k")
        print(f"-- {size} KiB", file=sys.stderr, flush=True)
        failed = code(command)
        now = whole_lines(out)
        assert now[: len(done)] == done, "what was certified before is not there any more"
        done = now
        assert not list(disk.rglob(".partial-*")), "what could not be written takes the room"
        if not failed:
            shutil.copytree(out, keep)
            print("-- fits", file=sys.stderr, flush=True)
            return
        assert failed == 2
    raise AssertionError("it never fitted")


def on_a_read_only_disk(command: Sequence[str], disk: Path) -> None:
    """A command while nothing can be written to ``disk``."""
    _private_mounts()
    _mount(str(disk), disk, "none", _BIND, "")
    _mount("none", disk, "none", _REMOUNT | _BIND | _READ_ONLY, "")
    sys.exit(code(command))


def whole_lines(out: Path) -> list[str]:
    """The certificates in the one run folder of ``out``, as written; a last line that is torn is no certificate."""
    files = list(out.glob("*/certificates.jsonl"))
    return files[0].read_text().split("\n")[:-1] if files else []


# Mounts that nobody else sees -------------------------------------------------------------------------

NO_MOUNTS = 77  # exit code where the system allows none
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


def _private_mounts() -> None:
    """Leave for a mount namespace of one's own; exit ``NO_MOUNTS`` where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.getuid()
    if not hasattr(libc, "unshare") or libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)):
        sys.exit(NO_MOUNTS)
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    _mount("none", Path("/"), "none", _RECURSIVE | _PRIVATE, "")


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    given = (source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    if libc.mount(*given):
        sys.exit(NO_MOUNTS)
