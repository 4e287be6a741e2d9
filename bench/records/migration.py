"""The one path from older schemas of run.json to today's. What an older certbench did not record is None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.errors import BenchError
from bench.records.schema import SCHEMA


def migrate(info: object) -> dict[str, Any]:
    """Return a run.json of any schema up to today's in today's form.

    Raises BenchError where it states no schema, or a newer one.
    """
    version = info.get("schema") if isinstance(info, dict) else None
    if not isinstance(info, dict) or type(version) is not int:
        raise BenchError("no schema version: not written by bench")
    if version > SCHEMA:
        raise BenchError(f"schema {version} is newer than this bench reads ({SCHEMA}); upgrade certbench")
    for kind, key in ((str, "status"), (dict, "identity")):
        if not isinstance(info.get(key), kind):
            raise BenchError(f"no {key!r} in it")
    for before, step in _STEPS.items():
        if version <= before:
            step(info)
    return info | {"schema": SCHEMA}


def _from_1(info: dict[str, Any]) -> None:
    """Add what schema 2 added: shared parts, settings in names, and the hash of the certificates."""
    if isinstance(defense := info.setdefault("defense", {}), dict):
        defense.update({"settings": {}, "search": [], "trained_elsewhere": []})
    info |= {"certificates_sha256": None, "environment": info.get("environment", {})}
    info |= {"arguments": info.get("arguments", {})}
    if isinstance(cost := info.get("cost"), dict):
        cost.update(trained_here=cost.get("trainable_nominal"), trained_elsewhere=0)


def _from_2(info: dict[str, Any]) -> None:
    """State the family of a defense and what it trains in two fields, as schema 3 does."""
    if isinstance(defense := info.setdefault("defense", {}), dict):
        family = defense.get("family")
        defense.update(trains=family, family="imported" if family == "imported" else "")


_STEPS: dict[int, Callable[[dict[str, Any]], None]] = {1: _from_1, 2: _from_2}
