"""A comparison of runs that shows itself in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.compare import pairs, pairs_text
from bench.compare.pairs import Comparison


@dataclass(frozen=True)
class Compared(Comparison):
    """Runs compared in pairs; as text it is the markdown of ``bench compare``."""

    def __str__(self) -> str:
        return pairs_text.markdown(self)

    def _repr_markdown_(self) -> str:
        return str(self)


def compared(paths: Sequence[Path]) -> Compared:
    """Compare the runs. Raises NotComparable."""
    return Compared(**vars(pairs.compare(paths)))
