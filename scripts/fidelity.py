"""Write docs/fidelity.md: each published value of a defense, beside this project's.

    python scripts/fidelity.py [--out FILE]        (make fidelity)

``fidelity.toml`` lists the rows. The values of this project are read from the code: the Config of the preset
``paper``, the cards, and constants. So the page cannot drift from them: a test writes it again and compares.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from torch import nn

from bench import plugins
from bench.data.card import Card
from bench.data.datasets import load_card
from bench.models.base import Classifier
from bench.options import RunOptions
from bench.runs.settings import configured

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")
PAGE = ROOT / "docs" / "fidelity.md"
CARD, PRESET = "cifar10", "paper"
HEAD = """# Fidelity to the papers

For each defense: the values of the paper or its released code, and those of `--preset paper` here. Where they differ,
the last column says why; *chosen* means that nothing is published. A linked test shows what no single value can.
`make fidelity` writes this page from the code and `scripts/fidelity.toml`; a test fails where they disagree.

"""
UNPUBLISHED = ("not stated", "always searched")


class Failed(Exception):
    """A row of the list is incomplete."""


@dataclass(frozen=True)
class Row:
    """One published value.

    ``ours`` is a format string over ``values``. Without it, ours is as released; ``test`` (file::function) shows that.
    ``why`` is required where the two differ, or nothing is published; the page leaves it out where they are equal.
    """

    what: str
    released: str
    source: str = ""
    ours: str = ""
    test: str = ""
    why: str = ""

    def cells(self, values: dict[str, Any]) -> list[str]:
        """Return the cells of the table. Raises Failed where the row does not say why the values differ."""
        published = f"{self.released} ({self.source})" if self.source else self.released
        if not self.ours:
            file, _, function = self.test.partition("::")
            if not file:
                raise Failed(f"{self.what}: give ours, or the test that shows that it is as released")
            return [self.what, published, "as released", f"same ([{function}](../{file}))"]
        ours = self.ours.format(**values)
        if ours == self.released:
            return [self.what, published, ours, "same"]
        if not self.why:
            raise Failed(f"{self.what}: {ours} here, {self.released} there: say why")
        return [self.what, published, ours, f"{'chosen' if self.released in UNPUBLISHED else 'differs'}: {self.why}"]


def sections() -> dict[str, tuple[str, list[Row]]]:
    """Read the list: for each section its paper and code, and its rows."""
    listed = tomllib.loads(LIST.read_text())
    return {name: (part["from"], [Row(**row) for row in part["rows"]]) for name, part in listed.items()}


def config(name: str, **settings: Any) -> Any:
    """Return a defense's Config of the paper preset."""
    return configured(name, plugins.load(name)[0], PRESET, load_card(CARD), settings)


def _count(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters):,}"


@cache  # the same for all sections
def sizes() -> dict[str, str]:
    """Count the parameters that are trained at the papers' sizes: on ViT-B/16 with 1,000 classes, or for RGB images."""
    with torch.device("meta"):
        vit = Classifier(timm.create_model("vit_base_patch16_224"), (0.5,) * 3, (0.5,) * 3)

    def trained(name: str, **settings: Any) -> str:
        context: Any = SimpleNamespace(classes=1000, shape=(3, 224, 224))
        context.base = SimpleNamespace(copy=lambda classes: copy.deepcopy(vit))
        defense = plugins.load(name)[0](context, config(name, **settings))
        return _count(p for p in defense.parameters() if p.requires_grad)

    denoiser, coordinator = (importlib.import_module(f"defenses.{module}") for module in ("denoiser", "coordinator"))
    paper = config("denoiser")
    with torch.device("meta"):
        net: nn.Module = denoiser.DnCNN(3, paper.depth, paper.width)
    return {
        "adapter": trained("adapter"),
        "parallel adapter": trained("adapter", parallel=0.1),
        "prompt": trained("prompt"),
        "lora of rank 1": trained("lora", rank=1),
        "head": trained("head"),
        "denoiser": _count(net.parameters()),
        "surrogates": str(len(denoiser._SURROGATES["paper"])),
        "coordinator": _count(coordinator.blackvip_decoder(768, 3).parameters()),
    }


def _scratch(card: Card) -> dict[str, str]:
    """Describe what ``retrain`` trains on a card: its network, normalisation and images."""
    preset = card.presets[PRESET]
    own: str = getattr(preset, "scratch_base", "")
    recipe = card.bases.get(own or preset.base)
    std = getattr(recipe, "std", ()) or card.std
    return {
        "network": own or preset.base or next(iter(card.bases)),
        "std": ", ".join(f"{s:.4f}" for s in std),
        "images": "all training images" if own else f"all but the {card.splits['validation']:,} of validation",
    }


def values(name: str) -> dict[str, Any]:
    """Return the names that the format strings of a section may use."""
    cards = {card: load_card(card) for card in ("cifar10", "imagenet")}
    return {
        "config": config(name) if name in plugins.names() else None,
        "defaults": RunOptions(defenses="none", dataset=CARD),
        "presets": {card: one.presets[PRESET] for card, one in cards.items()},
        "augment": {card: ", ".join(one.augment) for card, one in cards.items()},
        "scratch": {card: _scratch(one) for card, one in cards.items()},
        "sizes": sizes(),
        "objectives": importlib.import_module("bench.training.objectives"),
        "adapter": importlib.import_module("defenses.adapter"),
    }


def page() -> str:
    """Make the page. Raises Failed naming the section and the row that is incomplete."""
    lines, verdicts = [], Counter[str]()
    for name, (origin, listed) in sections().items():
        known = values(name)
        lines += [f"## {name}", "", origin, "", "| | published | here | |", "|---|---|---|---|"]
        for row in listed:
            try:
                cells = row.cells(known)
            except (Failed, KeyError, AttributeError, IndexError, ValueError) as e:
                raise Failed(f"{name}: {row.what}: {e}") from None
            verdicts[cells[-1].split(":")[0].split()[0]] += 1
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    same, differs, chosen = (verdicts[word] for word in ("same", "differs", "chosen"))
    total = (
        f"{verdicts.total()} values: {same} are the same, {differs} differ on purpose, {chosen} are not published.\n\n"
    )
    return HEAD + total + "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.parse_args().out.write_text(page())


if __name__ == "__main__":
    main()
