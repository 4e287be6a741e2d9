"""The number of cores that a process may use, and of threads beside a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.process import environment


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process to some of the cores")
def test_the_cores_are_those_that_the_process_may_use() -> None:
    """As in a container or a batch job with fewer cores than the machine."""
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from bench.process.environment import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize(("cores", "gpus", "threads"), [(16, 1, 8), (16, 4, 4), (2, 4, 1), (7, 2, 3)])
def test_gpus_share_the_cores(cores: int, gpus: int, threads: int) -> None:
    assert environment.gpu_threads(cores, gpus) == threads
