"""Contradictions of a certificate: an attacked image inside its radius that fresh votes give another class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.attacks.decide import Decided
from bench.io.files import replacing, writing
from bench.records.attack_writer import SPACE
from bench.records.attacks import Alarm

if TYPE_CHECKING:
    from bench.attacks.session import Attacker

FOLDER = "alarms"


def find(attacker: Attacker, index: int, decided: Sequence[Decided]) -> list[Alarm]:
    """Find the decisions that contradict the image's certificate, decide each again, and save the pairs of images.

    ``decided``: the decision on the clean image first.
    """
    certificates = attacker.record.counted
    certificate = certificates[certificates.place("index", index)]
    if certificate.predicted is None or not certificate.n:
        return []
    within = [
        d
        for d in decided
        if d.result.distance <= certificate.radius and d.result.predicted not in (None, certificate.predicted)
    ]
    if not within:
        return []
    again = attacker.decider("decide again").decide(index, {d.slot: d.image for d in within})
    return [
        Alarm.of(
            {
                "by": d.result.by,
                "distance": d.result.distance,
                "certified": certificate.predicted,
                "radius": certificate.radius,
                "predicted": d.result.predicted,
                "redrawn": again[d.slot].predicted,
                "files": _save(attacker, f"{attacker.settings.name}-{index}-{d.slot}", decided[0].image, d.image),
            }
        )
        for d in within
    ]


def _save(attacker: Attacker, name: str, clean: NDArray[Any], attacked: NDArray[Any]) -> list[str]:
    """Save the clean and the attacked image: exactly as .npy, and as .png to look at."""
    folder = attacker.record.path / FOLDER
    levels = attacker.rebuilt.run.plan.card.levels if clean.dtype.kind in "iu" else 2
    names = []
    with writing(folder, SPACE):
        folder.mkdir(exist_ok=True)
        for kind, image in (("clean", clean), ("attacked", attacked)):
            _npy(folder / f"{name}-{kind}.npy", image)
            names.append(f"{FOLDER}/{name}-{kind}.npy")
            if image.shape[0] in (1, 3):
                shown = np.rint(image.astype(np.float64) * (255 / (levels - 1))).astype(np.uint8).transpose(1, 2, 0)
                with replacing(folder / f"{name}-{kind}.png") as partial:
                    Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown).save(partial)
                names.append(f"{FOLDER}/{name}-{kind}.png")
    return names


def _npy(file: Path, image: NDArray[Any]) -> None:
    with replacing(file) as partial:
        np.save(partial, image)
