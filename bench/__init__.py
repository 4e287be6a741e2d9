"""certbench: certified defenses compared through one certification engine.

``bench.run`` makes runs and ``bench.load`` reads them (docs/python.md). Importing this loads neither torch nor pandas.
"""

from bench.api import Results, load, run
from bench.errors import BenchError

__version__ = "0.3.0"
__all__ = ["BenchError", "Results", "load", "run"]
