"""Differences between JSON objects, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested object under dotted names."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flatten(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found


def readable(value: Any) -> str:
    """Return a value as text, hashes and long values shortened."""
    if isinstance(value, str) and len(value) == 64:  # a hash
        return value[:8]
    text = "not stated" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the fields that differ, those of inner objects by their dotted names."""
    a, b = flatten(before), flatten(now)
    keys = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    return [f"{k} is {_counted(b.get(k))}, was {_counted(a.get(k))}" for k in keys]


def _counted(value: Any) -> str:
    return f"{len(value)} images" if isinstance(value, list) and len(value) > 4 else readable(value)
