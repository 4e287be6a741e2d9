"""Match a base's logits to the card's classes by name, and permute its head where their order differs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bench.errors import BenchError
from bench.models.base import Classifier

Names = tuple[str, ...]


def stated_names(base: str, *configs: Mapping[str, Any]) -> tuple[Names, ...]:
    """Return all lists of class names in timm's or transformers' configs, any of which a card may use.

    Raises BenchError beginning with ``base`` where an entry is not one name for each logit.
    """
    found: list[Names] = []
    for config in configs:
        descriptions = config.get("label_descriptions") or {}
        for key in ("label_names", "labels"):  # labels: timm before 0.9
            names = _listed(base, key, config.get(key))
            found.append(names)
            if isinstance(descriptions, Mapping) and all(isinstance(descriptions.get(n), str) for n in names):
                found.append(tuple(descriptions[n] for n in names))
        found.append(_listed(base, "id2label", config.get("id2label")))
        label2id = config.get("label2id")
        if isinstance(label2id, Mapping):
            found.append(_listed(base, "label2id", {str(v): k for k, v in label2id.items()}))
    # ImageNet's descriptions are lists of synonyms.
    found += [tuple(n.partition(",")[0] for n in names) for names in found if any("," in n for n in names)]
    # transformers names unnamed classes LABEL_0, LABEL_1, ...
    return tuple(dict.fromkeys(n for n in found if n and not all(re.fullmatch(r"LABEL_\d+", name) for name in n)))


def _listed(base: str, key: str, value: Any) -> Names:
    if isinstance(value, Mapping):
        value = {str(k): v for k, v in value.items()}
        if set(value) != {str(i) for i in range(len(value))}:
            raise BenchError(f"{base}: {key} in its config must number its classes 0 to {len(value) - 1}; correct it")
        value = [value[str(i)] for i in range(len(value))]
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str | int) for name in value):
        raise BenchError(f"{base}: {key} in its config must be a list of names, one for each logit; correct it")
    return tuple(map(str, value))


def card_order(base: str, names: Sequence[Names], classes: Names, card: str) -> tuple[list[int], str]:
    """Return the logit of each of the card's classes, and a remark on how it was determined.

    Without names, or where the card only numbers its classes, the card's order is assumed, and the remark says so.
    Raises BenchError where the names do not match the card's, or match in two orders.
    """
    same = list(range(len(classes)))
    if not names:
        return same, f"it names no classes, so its logits are assumed to be in the order of card {card}"
    orders = [order for known in names if (order := _matched(known, classes)) is not None]
    if any(order != orders[0] for order in orders):
        raise BenchError(f"{base}: its config names its classes twice, in two orders; remove the wrong one")
    if orders and orders[0] == same:
        return same, f"its classes are named and ordered as those of card {card}"
    if orders:
        return orders[0], f"its logits are permuted into the order of card {card}, by the names of its classes"
    theirs, ours = (", ".join(f"{n:.40}" for n in part[:3]) + ", ..." * (len(part) > 3) for part in (names[0], classes))
    numbered = classes == tuple(map(str, range(len(classes)))) and not all(name.isdigit() for name in names[0])
    if numbered and len(names[0]) == len(classes):
        return same, f"it names its classes ({theirs}) and card {card} numbers them: logit 0 is assumed to be class 0"
    raise BenchError(
        f"{base}: its config names {len(names[0])} classes (label_names: {theirs}), and card {card} has "
        f"{len(classes)} other names ({ours}); if they are the same classes, use the same names in both; else give "
        f"another base"
    )


def _matched(names: Names, classes: Names) -> list[int] | None:
    """Return the position of each class in ``names``: by exact match, else ignoring case and spaces; None if none."""
    for form in (str, _plain):
        places = {form(name): i for i, name in enumerate(names)}
        wanted = [form(name) for name in classes]
        if len(places) == len(names) == len(wanted) and places.keys() == set(wanted):
            return [places[name] for name in wanted]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def permute(base: str, module: Classifier, order: Sequence[int], shape: tuple[int, int, int]) -> None:
    """Permute the logits of ``module`` into ``order``, in the weights of its heads.

    Raises BenchError where a head is not one layer with a row for each logit, or the logits do not follow its rows.
    """
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(order)
    with torch.no_grad():
        before = module.eval()(x)
        for head in module.heads():
            if not isinstance(head, nn.Linear | nn.Conv2d) or len(head.weight) != len(order):
                raise BenchError(
                    f"{base}: its classes are in another order, and its head, a {type(head).__name__}, cannot be "
                    f"permuted; list the card's classes in the base's order"
                )
            head.weight.copy_(head.weight[rows])
            if head.bias is not None:
                head.bias.copy_(head.bias[rows])
        if not torch.allclose(module(x), before[:, rows], rtol=1e-4, atol=1e-5 * float(before.abs().max())):
            raise BenchError(
                f"{base}: its classes are in another order, and its logits do not follow its head's rows; list the "
                f"card's classes in the base's order"
            )
