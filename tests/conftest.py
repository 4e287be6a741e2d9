"""Fixtures shared by all tests: a scratch cache, and the command line called in process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.commands import Bench, Result

# No time limits: the suite may share its cores.
settings.register_profile("certbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("certbench")


@pytest.fixture(scope="session", autouse=True)
def scratch_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests train out of the user's cache; share it within a session."""
    root = tmp_path_factory.mktemp("cache")
    before = os.environ.get("CERTBENCH_CACHE")
    os.environ["CERTBENCH_CACHE"] = str(root)
    yield root
    os.environ.pop("CERTBENCH_CACHE")
    if before is not None:
        os.environ["CERTBENCH_CACHE"] = before


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads, and so that of the threads that draw votes; restore it afterwards."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def bench(capfd: pytest.CaptureFixture[str]) -> Bench:
    """Call the command ``bench`` in process; return its exit code, stdout and stderr."""
    from bench.cli import main

    def call(*args: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        out, err = capfd.readouterr()
        return Result(int(stop.value.code or 0), out, err)

    return call
