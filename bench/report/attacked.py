"""Certified and attacked accuracy side by side: the true robust accuracy lies between them, up to alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from bench.records.attacks import Attack, of_run, strongest
from bench.records.metrics import Rate
from bench.records.record import Record
from bench.report.rows import Method

NOTE = (
    "Certified accuracy <= true robust accuracy <= attacked accuracy, each but for a chance of alpha an image; on the "
    "same images, with 95% intervals. Attacked: images for which no attack within the radius made fresh votes decide "
    "another class than the label; of these, abstained: those on which some decision gave no class. An attack that "
    "fails proves nothing: more effort can only lower attacked accuracy."
)


@dataclass(frozen=True)
class Attacked:
    """The attack on one run that a report shows: of those on the most images the one of the most effort."""

    label: str
    record: Record
    attack: Attack

    @property
    def radii(self) -> list[float]:
        """The radii at which both accuracies are known: 0 and those attacked."""
        return [0.0, *self.attack.settings.radii]


def find(methods: Sequence[Method]) -> tuple[list[Attacked], list[str]]:
    """Return the attacks on the runs of a table's methods, and a line for each run of which some are left out."""
    found, left_out = [], []
    for method in methods:
        for record in method.records:
            attacks, left = of_run(record)
            left_out += [left] if left else []
            if best := strongest(attacks):
                seed = f", seed {record.identity.seed}" if len(method.records) > 1 else ""
                found.append(Attacked(f"{method.label}{seed}", record, best))
    return found, left_out


def cells(attacked: Sequence[Attacked]) -> pd.DataFrame:
    """Write the table: a row for each run and radius, with the budget of its attack."""
    return pd.DataFrame([_cells(one, radius) for one in attacked for radius in one.radii])


def _cells(one: Attacked, radius: float) -> dict[str, str]:
    attack, alarms = one.attack, len(one.attack.alarms)
    return {
        "defense": one.label,
        "radius": f"{radius:g}",
        "certified": _share(attack.certified(one.record, radius)),
        "attacked": _share(attack.attacked_accuracy(radius)),
        "of these abstained": _share(attack.abstained(radius)),
        "images": f"{len(attack.images)}",
        "budget of the attack": f"{attack.settings.preset}: {attack.settings.budget}"
        + (f"; {alarms} ALARMS" if alarms else ""),
    }


def numbers(record: Record, attack: Attack) -> list[dict[str, Any]]:
    """Return the accuracies as JSON, one object a radius."""
    return [
        {
            "radius": radius,
            "certified": asdict(attack.certified(record, radius)),
            "attacked": asdict(attack.attacked_accuracy(radius)),
            "abstained": asdict(attack.abstained(radius)),
        }
        for radius in [0.0, *attack.settings.radii]
    ]


def text(record: Record, attack: Attack) -> str:
    """Write one attack as markdown: its budget, and its accuracies."""
    shown = cells([Attacked(record.path.name, record, attack)])
    grid = shown.drop(columns=["defense", "images", "budget of the attack"])
    settings = attack.settings
    return (
        f"{record.path.name}: attack {settings.name}, preset {settings.preset}: {settings.budget}; "
        f"{len(attack.images)} images\n\n{grid.to_markdown(index=False, disable_numparse=True)}\n\n{NOTE}\n"
    )


def _share(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
