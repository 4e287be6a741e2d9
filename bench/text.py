"""Text of tables: the dash, and escaping of untrusted text."""

from __future__ import annotations

import re

from bench.errors import shown

DASH = "—"  # out of reach, or not known


def escape(text: str) -> str:
    """Escape untrusted text of a record, as one line of markdown that shows it literally."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown(" ".join(text.split())))
