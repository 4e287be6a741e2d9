"""Which class each logit of a base stands for: its config's names against the card's, and logits put into order."""

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
    """The names that timm's or transformers' configs give the logits, each under which they may be known to a card.

    Raises BenchError beginning with ``base`` where an entry is not readable as one name a logit.
    """
    found: list[Names] = []
    for config in configs:
        descriptions = config.get("label_descriptions") or {}
        for key in ("label_names", "labels"):  # the second is timm's before 0.9
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
    # transformers calls unnamed classes LABEL_0, LABEL_1, ...
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
        raise BenchError(f"{base}: {key} in its config must be a list of names, one a logit; correct it")
    return tuple(map(str, value))


def card_order(base: str, names: Sequence[Names], classes: Names, card: str) -> tuple[list[int], str]:
    """The logit of each of the card's classes, and a remark on how that is known.

    Without names, or where the card only numbers its classes, it is taken to be the card's own order, and the
    remark says so. Raises BenchError where the names do not fit the card's, or fit in two orders.
    """
    same = list(range(len(classes)))
    if not names:
        return same, f"it names no classes, so its logits are taken to be in the order of card {card}"
    orders = [order for known in names if (order := _matched(known, classes)) is not None]
    if any(order != orders[0] for order in orders):
        raise BenchError(f"{base}: its config names its classes twice, in two orders; leave the right one in it")
    if orders and orders[0] == same:
        return same, f"its classes are named and ordered as those of card {card}"
    if orders:
        return orders[0], f"its logits are put into the order of card {card}, by the names of its classes"
    theirs, ours = (", ".join(f"{n:.40}" for n in part[:3]) + ", ..." * (len(part) > 3) for part in (names[0], classes))
    numbered = classes == tuple(map(str, range(len(classes)))) and not all(name.isdigit() for name in names[0])
    if numbered and len(names[0]) == len(classes):
        return same, f"it names its classes ({theirs}) and card {card} numbers them: logit 0 is taken for class 0"
    raise BenchError(
        f"{base}: its config names its {len(names[0])} classes (label_names: {theirs}), and card {card} has "
        f"{len(classes)} others ({ours}): where they are the same, name them alike in either; else give another base"
    )


def _matched(names: Names, classes: Names) -> list[int] | None:
    """The place of each class in ``names``: as they are written or, where that does not do, but for case and spaces."""
    for form in (str, _plain):
        places = {form(name): i for i, name in enumerate(names)}
        wanted = [form(name) for name in classes]
        if len(places) == len(names) == len(wanted) and places.keys() == set(wanted):
            return [places[name] for name in wanted]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def permute(base: str, module: Classifier, order: Sequence[int], shape: tuple[int, int, int]) -> None:
    """Put the logits of ``module`` into ``order``, in the weights of its heads.

    Raises BenchError where a head is not one layer with a row a logit, or the logits do not follow its rows.
    """
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor(order)
    with torch.no_grad():
        before = module.eval()(x)
        for head in module.heads():
            if not isinstance(head, nn.Linear | nn.Conv2d) or len(head.weight) != len(order):
                raise BenchError(
                    f"{base}: its classes are in another order, and its head, a {type(head).__name__}, has no rows"
                )
            head.weight.copy_(head.weight[rows])
            if head.bias is not None:
                head.bias.copy_(head.bias[rows])
        if not torch.allclose(module(x), before[:, rows], rtol=1e-4, atol=1e-5 * float(before.abs().max())):
            raise BenchError(f"{base}: its classes are in another order, and its logits do not follow its head's rows")
