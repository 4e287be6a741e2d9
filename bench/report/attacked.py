"""Certified and attacked accuracy side by side: the true robust accuracy lies between them, up to alpha."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from bench.errors import BenchError
from bench.records.attacks import Attack, of_run, strongest
from bench.records.metrics import Rate
from bench.records.record import Record
from bench.report.rows import Method

BUDGET = ["images", "budget of the attack"]  # columns that are the same for all radii
TITLE = "Certified and attacked accuracy"
NOTE = (
    "Certified accuracy <= true robust accuracy <= attacked accuracy, but for a chance of alpha for each certificate "
    "and each decision of an attack; on the same images, with 95% intervals. Attacked: images for which no attack "
    "within the radius made fresh votes decide another class than the label; of these, abstained: those on which some "
    "decision gave no class. An attack that fails proves nothing: more effort can only lower attacked accuracy."
)


@dataclass(frozen=True)
class Attacked:
    """The attack on one run that a report shows: of those on the most images the one of the most effort."""

    label: str
    method: str  # label of the method in the report
    record: Record
    attack: Attack

    @property
    def budget(self) -> str:
        """The preset and the effort of the attack."""
        return f"{self.attack.settings.preset}: {self.attack.settings.budget}"

    @property
    def radii(self) -> list[float]:
        """The radii at which both accuracies are known: 0 and those attacked."""
        return [0.0, *self.attack.settings.radii]

    @property
    def lower(self) -> list[float]:
        """Certified accuracy at each radius, in percent."""
        return [100 * self.attack.certified(self.record, r).value for r in self.radii]

    @property
    def upper(self) -> list[float]:
        """Attacked accuracy at each radius, in percent."""
        return [100 * self.attack.attacked_accuracy(r).value for r in self.radii]

    @property
    def band(self) -> tuple[list[float], list[float], list[float]]:
        """Radii, lower edge and upper edge of the band: the ends of each piece between two radii.

        There, what is certified at the larger radius is certified, and what is attacked within the smaller one is
        attacked.
        """
        radii = [r for ends in pairwise(self.radii) for r in ends]
        return radii, [v for v in self.lower[1:] for _ in (0, 1)], [v for v in self.upper[:-1] for _ in (0, 1)]


@dataclass(frozen=True)
class Attacks:
    """What a table shows of attacks on its runs; ``left_out``: a line for each run of which it shows less."""

    shown: tuple[Attacked, ...] = ()
    left_out: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.shown or self.left_out)

    @property
    def note(self) -> str:
        """How to read the numbers, and what is missing."""
        return " ".join([*([NOTE] if self.shown else []), *(f"{line}." for line in self.left_out)])


def find(methods: Sequence[Method]) -> Attacks:
    """Return the attacks on the runs of a table's methods."""
    found, left_out = [], []
    for method in methods:
        for record in method.records:
            try:
                attacks, left = of_run(record)
            except BenchError as e:
                attacks, left = [], f"attacks left out: {e}"
            left_out += [left] if left else []
            if best := strongest(attacks):
                seed = f", seed {record.identity.seed}" if len(method.records) > 1 else ""
                found.append(Attacked(f"{method.label}{seed}", method.label, record, best))
    return Attacks(tuple(found), tuple(left_out))


def cells(attacked: Sequence[Attacked]) -> pd.DataFrame:
    """Write the table: a row for each run and radius, with the budget of its attack."""
    return pd.DataFrame([_cells(one, radius) for one in attacked for radius in one.radii])


def budgets(attacked: Sequence[Attacked]) -> str:
    """Return the budgets of the attacks, in one sentence for all runs that share one."""
    runs: dict[str, list[str]] = {}
    for one in attacked:
        runs.setdefault(f"{one.budget}; {len(one.attack.images)} images", []).append(one.label)
    return " ".join(f"{', '.join(labels)}: attack of preset {budget}." for budget, labels in runs.items())


def _cells(one: Attacked, radius: float) -> dict[str, str]:
    attack, alarms = one.attack, len(one.attack.alarms)
    return {
        "defense": one.label,
        "radius": f"{radius:g}",
        "certified": _share(attack.certified(one.record, radius)),
        "attacked": _share(attack.attacked_accuracy(radius)),
        "of these abstained": _share(attack.abstained(radius)),
        "images": f"{len(attack.images)}",
        "budget of the attack": one.budget + (f"; {alarms} ALARMS" if alarms else ""),
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


def as_json(attacks: Attacks) -> list[dict[str, Any]]:
    """Return the attacks of a table as JSON, each with its budget."""
    return [
        {
            "run": one.record.path.name,
            "settings": one.attack.settings.as_json(),
            "accuracy": numbers(one.record, one.attack),
            "alarms": [{"index": image.index, **alarm.as_json()} for image, alarm in one.attack.alarms],
        }
        for one in attacks.shown
    ]


def text(record: Record, attack: Attack) -> str:
    """Write one attack as markdown: its budget, and its accuracies."""
    shown = cells([Attacked(record.path.name, record.path.name, record, attack)])
    grid = shown.drop(columns=["defense", *BUDGET])
    settings = attack.settings
    return (
        f"{record.path.name}: attack {settings.name}, preset {settings.preset}: {settings.budget}; "
        f"{len(attack.images)} images\n\n{grid.to_markdown(index=False, disable_numparse=True)}\n\n{NOTE}\n"
    )


def _share(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
