"""The certification procedures there are, and how a record states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bench.smoothing.anytime import Anytime, Calibration
from bench.smoothing.fixed import Fixed

Procedure = Fixed | Anytime

# Constants of the anytime procedure that only one calibration uses; records of the other do not state them.
_ONLY: dict[Calibration, tuple[str, ...]] = {
    "exact": ("spending",),
    "ville": ("ville_share", "components", "fastest", "slowest"),
}


def describe(procedure: Procedure) -> dict[str, Any]:
    """Return the kind and every constant of a procedure, as a record states them."""
    fields = {"kind": procedure.kind, **asdict(procedure)}
    if isinstance(procedure, Anytime):
        fields["radii"] = list(procedure.radii)
        for calibration, names in _ONLY.items():
            for name in names if calibration != procedure.calibration else ():
                del fields[name]
    return fields


def procedure_of(identity: Mapping[str, Any]) -> Procedure:
    """Return the procedure that a record's identity states; the inverse of ``describe``."""
    fields = {k: v for k, v in identity["procedure"].items() if k != "kind"}
    if identity["procedure"]["kind"] == "fixed":
        return Fixed(**fields)
    if identity["procedure"]["kind"] == "adaptive":  # of an imported log: no image gets more votes than its cap
        return Fixed(fields["n0"], fields["n"], fields["alpha"])
    # Until 0.2.0 records stated no calibration: it was by Ville's inequality.
    return Anytime(**{"calibration": "ville", **fields, "radii": tuple(fields["radii"])})
