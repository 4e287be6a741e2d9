"""Rows of ``bench list``, read from files without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import plugins
from bench.data.card import Card, split_names
from bench.data.datasets import card_files, load_card
from bench.errors import shown, unknown
from bench.records import status

Rows = list[dict[str, object]]  # one dict a row, keys are the columns


def rows(what: str, out: Path) -> Rows:
    """List defenses, datasets, bases, or the runs of a folder. Raises BenchError for any other kind."""
    kinds: dict[str, Callable[[], Rows]] = {
        "defenses": _defenses,
        "datasets": _datasets,
        "bases": _bases,
        "runs": lambda: _runs(out),
    }
    if what not in kinds:
        raise unknown("list", what, kinds)
    return kinds[what]()


def _defenses() -> Rows:
    return [vars(row) for row in plugins.listing()]


def _datasets() -> Rows:
    cards = [load_card(name) for name in card_files()]
    return [
        {
            "name": c.name,
            "shape": "x".join(map(str, c.shape)),
            "classes": len(c.classes),
            "source": getattr(c.source, "hub", "") or c.source.reader,
            "presets": ", ".join(c.presets),
            "splits": ", ".join(splits(c)),
        }
        for c in cards
    ]


def splits(card: Card) -> list[str]:
    """Name a card's splits; those of corruptions in one word, with their number."""
    if card.corruptions is None:
        return list(split_names(card))
    parts, corruptions = card.corruptions.parts(), card.corruptions
    words = f"test-CORRUPTION-1 to -{corruptions.severities} ({len(corruptions.names)} corruptions)"
    return [*(name for name in split_names(card) if name not in parts), words]


def _bases() -> Rows:
    cards = [load_card(name) for name in card_files()]
    return [
        {"dataset": c.name, "name": n, "model": b.model, "summary": b.summary}
        for c in cards
        for n, b in c.bases.items()
    ]


def _runs(out: Path) -> Rows:
    return [
        {
            "run": shown(r.run),
            "state": r.state,
            "images": status.images_done(r),
        }
        for r in status.rows(out)
    ]
