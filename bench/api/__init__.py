"""The Python interface, ``import bench``: ``run`` and ``load``. Heavy imports happen inside the functions."""

from bench.api.results import Results, load
from bench.api.running import Options, run

__all__ = ["Options", "Results", "load", "run"]
