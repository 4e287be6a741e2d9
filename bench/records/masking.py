"""Signs that gradients are masked, so that an attack fails without the defense being robust.

From Athalye et al. 2018 (arXiv 1802.00420, section 3.1) and the automatic checks of AutoAttack (Croce and Hein 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from bench.records.attacks import Attack, AttackedImage, By

LEVEL = 0.05  # of the paired tests: chance that attacks of equal strength give a warning

Status = Literal["ok", "warning", "no evidence"]


@dataclass(frozen=True)
class Check:
    """One sign, whether it is there, and its figures."""

    status: Status
    text: str


def checks(attack: Attack) -> list[Check]:
    """Look for each sign, over the images whose clean decision is not already another class."""
    images = [i for i in attack.images if i.results[0].predicted in (None, i.label)]
    if not images:
        return [Check("no evidence", "no image is predicted right without an attack, so nothing was attacked")]
    return list(_checks(attack, images))


def _checks(attack: Attack, images: list[AttackedImage]) -> Iterator[Check]:
    radius, white = attack.settings.checked, attack.settings.white_box
    best: By = "pgd" if white else "query"
    if white:
        yield _no_better("black box no better than white box", "query", "pgd", images, attack.settings.radii)
        gradients, zero = sum(i.gradients for i in images), sum(i.zero for i in images)
        yield Check(
            "warning" if zero else "ok",
            f"gradients are not zero: {zero} of {gradients} are zero or not finite ({zero / max(1, gradients):.1%})",
        )
        yield _no_better("one step no better than many", "step", "pgd", images, [radius])
    else:
        yield Check("no evidence", "no gradients reach the image, so there is no white-box attack to compare with")
    # bench attacks each of the images so, but the file may be changed.
    unbounded = [(i.label, r.predicted) for i in images if (r := i.result("unbounded")) is not None]
    kept = sum(predicted == label for label, predicted in unbounded)
    undecided = sum(predicted is None for _, predicted in unbounded)
    yield Check(
        "warning" if kept else "ok" if unbounded else "no evidence",
        f"an unbounded attack succeeds: {len(unbounded) - kept - undecided} of {len(unbounded)} images change their "
        f"class, {undecided} abstain, {kept} keep the label",
    )
    random, found = _found(images, "noise", radius), _found(images, best, radius)
    status: Status = "no evidence" if not random and not found else "warning" if random >= found else "ok"
    yield Check(
        status,
        f"random noise is weaker: it changes the class of {random} of {len(images)} images at r = {radius:g}, "
        f"{_names(best)} of {found}",
    )


def _no_better(title: str, weak: By, strong: By, images: list[AttackedImage], radii: list[float]) -> Check:
    """Compare two attacks by the smallest of ``radii`` at which each succeeds: exact sign test over the images."""
    first = [[_first(image, by, radii) for by in (weak, strong)] for image in images]
    alone = sum(w < s for w, s in first), sum(s < w for w, s in first)
    p = float(stats.binom.sf(alone[0] - 1, sum(alone), 0.5)) if sum(alone) else 1.0
    counts = [_found(images, by, radii[-1]) for by in (weak, strong)]
    status: Status = "warning" if p < LEVEL else "ok" if any(counts) else "no evidence"
    return Check(
        status,
        f"{title}: {_names(weak)} changes the class of {counts[0]} of {len(images)} images up to r = {radii[-1]:g}, "
        f"{_names(strong)} of {counts[1]}; {alone[0]} images fall to {_names(weak)} alone or at a smaller radius, "
        f"{alone[1]} to {_names(strong)}, sign test p = {p:.2g}",
    )


def _first(image: AttackedImage, by: By, radii: list[float]) -> float:
    """Return the smallest of ``radii`` at which an attack changes the class; infinity where it never does."""
    return next((r for r in radii if image.outcome(r, by) == "attacked"), math.inf)


def _found(images: list[AttackedImage], by: By, radius: float) -> int:
    return sum(image.outcome(radius, by) == "attacked" for image in images)


def _names(by: By) -> str:
    return {"pgd": "PGD", "step": "one step", "noise": "random noise"}.get(by, by)
