"""The certification procedures there are, and how a record states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bench.smoothing.anytime import Anytime
from bench.smoothing.fixed import Fixed

Procedure = Fixed | Anytime


def describe(procedure: Procedure) -> dict[str, Any]:
    """Return the kind and every constant of a procedure, as a record states them."""
    fields = asdict(procedure)
    return {"kind": procedure.kind, **fields, **({"radii": list(fields["radii"])} if "radii" in fields else {})}


def procedure_of(identity: Mapping[str, Any]) -> Procedure:
    """Return the procedure that a record's identity states; the inverse of ``describe``."""
    fields = {k: v for k, v in identity["procedure"].items() if k != "kind"}
    if identity["procedure"]["kind"] == "fixed":
        return Fixed(**fields)
    if identity["procedure"]["kind"] == "adaptive":  # of an imported log: no image gets more votes than its cap
        return Fixed(fields["n0"], fields["n"], fields["alpha"])
    return Anytime(**{**fields, "radii": tuple(fields["radii"])})
