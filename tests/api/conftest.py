"""The command line under a name that the module ``bench`` leaves free."""

from __future__ import annotations

import pytest

from tests.helpers.commands import Bench


@pytest.fixture
def bench_command(bench: Bench) -> Bench:
    return bench
