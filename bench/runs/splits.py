"""The splits of the cards of one command, each read once."""

from __future__ import annotations

from bench.data.card import Card, split_names
from bench.data.datasets import load_splits
from bench.data.parquet_files import agreed
from bench.data.split import Split
from bench.runs.plan import Plan

USUAL = ("train", "validation", "test")


class Splits:
    """Splits by card: the usual ones are kept; of the named test parts, one a card, since a study may have dozens."""

    def __init__(self) -> None:
        self._usual: dict[str, dict[str, Split]] = {}
        self._named: dict[str, Split] = {}

    def usual(self, card: Card) -> dict[str, Split]:
        """Return train, validation, and test where the card has it."""
        if card.name not in self._usual:
            names = [name for name in USUAL if name in split_names(card)]
            self._usual[card.name] = dict(zip(names, load_splits(card, *names), strict=True))
        return self._usual[card.name]

    def trained_on(self, plan: Plan) -> Split:
        """Return the images that the plan's preset trains on."""
        return self.usual(plan.card)["train"].first(plan.card.presets[plan.preset].train_examples)

    def certified(self, plan: Plan) -> Split:
        """Return the split that the plan certifies; of train, the images that its preset trains on."""
        if plan.split == "train":
            return self.trained_on(plan)
        usual, name = self.usual(plan.card), plan.card.name
        if plan.split in usual:
            return usual[plan.split]
        if name not in self._named or self._named[name].name != plan.split:
            (self._named[name],) = load_splits(plan.card, plan.split)
            agreed(plan.card, [split.names for split in (*usual.values(), self._named[name])])
        return self._named[name]
