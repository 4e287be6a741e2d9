"""What the certificates of one run say: pure functions of the record, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import bounds
from bench.certify import Certificate


def certified(certificates: Sequence[Certificate], radius: float) -> int:
    """How many images are predicted correctly, without abstaining, with a certified radius of at least ``radius``."""
    return sum(c.predicted == c.label and c.radius >= radius for c in certificates)


def summarise(certificates: Sequence[Certificate], radii: Sequence[float]) -> dict[str, Any]:
    """Certified accuracy at each radius and abstention rate, each with its 95% Clopper-Pearson interval; ACR last."""
    total = len(certificates)
    correct = [c for c in certificates if c.predicted == c.label]
    return {
        "images": total,
        "certified_accuracy": [{"radius": r, **_share(certified(certificates, r), total)} for r in radii],
        "abstained": _share(sum(c.predicted is None for c in certificates), total),
        "acr": sum(c.radius for c in correct) / total if total else 0.0,
    }


def _share(count: int, total: int) -> dict[str, Any]:
    low, high = bounds.interval(count, total)
    return {"count": count, "value": count / total if total else 0.0, "low": low, "high": high}
