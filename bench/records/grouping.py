"""Group the runs that may share a table, and describe what they have in common.

They differ only in the defense and its seed: same images, base, sigma, n0, n, alpha, procedure. A base of other
classes is the same with a linear probe as without, where the defense brought its own head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.io.files import digest
from bench.records.record import Record

# Settings of training alone, as bench.interface.Schedule has them.
TRAINING = frozenset(("epochs", "batch", "optimizer", "lr", "momentum", "weight_decay", "decay", "warmup"))


def comparable(record: Record) -> dict[str, Any]:
    """Return the part of an identity that must agree for two runs to share a table, as JSON.

    Not the version of grid noise, whose votes all versions draw from one distribution, with the same tau: the exact
    rounded Gaussian of the same thresholds. Tests of a table pair images, never votes.
    """
    kept = {k: v for k, v in record.identity.as_json().items() if k not in ("defense", "train_sigma", "seed")}
    kept["noise"] = {k: v for k, v in kept["noise"].items() if k != "grid_version"}
    return kept if record.imported else kept | {"base": {**kept["base"], "sha256": record.info.base_sha256}}


def comparable_but_sigma(record: Record) -> dict[str, Any]:
    """Return the part of an identity that must agree for two runs to be shown together at different sigmas."""
    same = {k: v for k, v in comparable(record).items() if k != "sigma"}
    return same | {"noise": {k: v for k, v in same["noise"].items() if k != "tau"}}  # tau follows from sigma


def comparable_but_split(record: Record) -> dict[str, Any]:
    """Return the part of an identity that must agree for two runs to be compared on different splits."""
    return {k: v for k, v in comparable(record).items() if k not in ("split", "indices", "images")}


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Group the runs that may share a table, by data set, split (test parts first) and sigma."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_key[digest(comparable(record))].append(record)
    tables = [sorted(g, key=lambda r: (method_name(r), r.identity.seed or 0)) for g in by_key.values()]
    return sorted(tables, key=_order)


def _order(group: Sequence[Record]) -> tuple[Any, ...]:
    identity = group[0].identity
    rank = ["test", "validation", "train"].index(identity.split) if "-" not in identity.split else 0
    return identity.dataset, rank, identity.split, identity.sigma, digest(comparable(group[0]))


def methods(group: Sequence[Record]) -> list[list[Record]]:
    """Group a table's runs by method: those that differ only in their seed and what follows from it."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        found[digest({"method": [*method_key(record), record.identity.train_sigma]})].append(record)
    apart: list[list[Record]] = []
    for records in found.values():
        same = len({r.identity.seed for r in records}) == len(records)
        apart += [records] if same else [[r] for r in records]
    return apart


def method_key(record: Record) -> list[Any]:
    """Return what two runs of one method have in common, except the sigma they were trained at."""
    defense = record.identity.defense
    config = {k: v for k, v in defense.config.items() if k not in searched(record)}
    given = record.info.defense.weights_file and defense.weights
    objective = [defense.objective, defense.objective_constants] if defense.objective_constants else defense.objective
    computed = [defense.arithmetic, defense.training_arithmetic] if defense.training_arithmetic else defense.arithmetic
    return [defense.name, defense.source, config, objective, given, computed or None]


def searched(record: Record) -> set[str]:
    """Return the settings whose value was searched for."""
    return {key for tried in record.info.defense.search for key in tried.values}


def abstentions_known(record: Record) -> bool:
    """Return whether every image shows if the model abstains on it.

    A run that tests the known label neither predicts nor abstains. One of target "correct" draws no votes from which
    an image of a wrong class could abstain.
    """
    return record.identity.sampling.target == "selected"


def table_radii(records: Sequence[Record]) -> list[float]:
    """Return the radii of a table of these runs: all that any of them states.

    Of imported logs, which are checked for rounding at their own radii alone, only those that all of them state.
    """
    imported = [r.info.radii for r in records if r.imported]
    stated = {radius for record in records for radius in record.info.radii}
    kept = [r for r in stated if all(r in radii for radii in imported)]
    # Of two that are printed alike the larger: what is certified there is certified at the other too.
    return list({f"{r:g}": r for r in sorted(kept)}.values())


def setting(record: Record) -> str:
    """Describe what any two runs that are compared have in common, in one line."""
    identity = record.identity
    images = f"{len(identity.indices)} {identity.split} images"
    return f"{identity.dataset}, sigma {identity.sigma:g}: {images}, {_votes(record)}"


def _votes(record: Record) -> str:
    identity = record.identity
    p = identity.sampling
    selection = "known label, " if p.target == "label" else f"n0 {p.n0 or 'not stated'}, "
    selection += "target correct, " if p.target == "correct" else ""
    votes = f"n {p.n:,}" if p.kind == "fixed" else f"{p.kind} up to {p.n:,} votes"
    return f"{selection}{votes}, alpha {p.alpha:g}, noise {identity.noise.kind}"


def heading(record: Record) -> str:
    """Describe what all runs of a table have in common, in one line."""
    return f"{setting(record)}, base {_base(record)}"


def heading_of_splits(record: Record) -> str:
    """Describe what runs on several splits have in common, in one line."""
    identity = record.identity
    return f"{identity.dataset}, sigma {identity.sigma:g}: {_votes(record)}, base {_base(record)}"


def _base(record: Record) -> str:
    base, sha256 = record.identity.base, record.info.base_sha256
    return f"{base.name} ({sha256[:8]})" if base and sha256 and not record.imported else "not stated"


def common(record: Record) -> str:
    """Describe the same without data set and sigma."""
    return heading(record).partition(": ")[2]


def method_name(record: Record) -> str:
    """Name a method: the defense, its settings and objective other than the defaults, brought weights, searches."""
    return _name(record, frozenset())


def short_names(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Name methods that stand side by side, each by one of its runs.

    Settings of training alone, and searches for them, are left out of a name where all methods of the defense share
    them.

    Returns:
        The name of each, and the words that it is without.
    """
    words: dict[str, list[list[str]]] = defaultdict(list)
    for record in records:
        words[record.identity.defense.name].append(_of_training(record))
    found = []
    for record in records:
        own, each = _of_training(record), words[record.identity.defense.name]
        shared = [word for word in own if all(word in other for other in each)]
        found.append((_name(record, frozenset(shared)), ", ".join(shared)))
    return found


def _of_training(record: Record) -> list[str]:
    """Return the words of a method's name that say how it was trained: settings, then searches."""
    changed = [_setting(k, v) for k, v in record.info.defense.settings.items() if k in TRAINING]
    return changed + [f"{key} searched" for key in sorted(searched(record)) if key in TRAINING]


def _setting(key: str, value: Any) -> str:
    return key if value is True else f"{key}={value}"


def _name(record: Record, without: frozenset[str]) -> str:
    defense, info = record.identity.defense, record.info.defense
    words = [defense.name]
    words += [word for k, v in info.settings.items() if (word := _setting(k, v)) not in without]
    words += [] if defense.objective in (None, "gaussian") else [f"+ {defense.objective}"]
    words += defense.arithmetic
    # Older records state the hash of a defense's own weights alone.
    sha256 = info.weights_sha256 or defense.weights
    words += [f"({info.weights_file} {sha256:.8})"] if info.weights_file and sha256 else []
    keys = [key for key in sorted(searched(record)) if f"{key} searched" not in without]
    return " ".join(words) + (f", {', '.join(keys)} searched" if keys else "")


def reach(record: Record) -> float:
    """Return the largest radius that any image of the record could be certified at."""
    return record.identity.procedure.largest_radius(record.identity.sigma, record.identity.noise.tau)
