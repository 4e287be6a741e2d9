"""Text that tables print: a dash, and what others wrote made safe."""

from __future__ import annotations

import re

from bench.errors import shown

DASH = "—"  # what cannot be, or is not known


def escape(text: str) -> str:
    """Text of a record, which anyone may have written, as one line of markdown that shows it literally."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown(" ".join(text.split())))
