"""The global random states that a defense may use without being told: torch's, numpy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def fixed_rng(*key: int) -> Iterator[None]:
    """Seed torch, numpy and Python by ``key`` within this context, and restore their states afterwards.

    A defense is built, trained, loaded and merged within it, so that the shards, workers and resumes of a run
    hold the same classifier even where it takes randomness from a global generator.
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
