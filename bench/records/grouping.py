"""Which runs may share a table, and what they have in common.

They differ in nothing but the defense and its seed: same images, base, sigma, n0, n, alpha, procedure. A base of other
classes is the same whether a linear probe was put on it or the defense brought a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.io.files import digest
from bench.records.record import Record
from bench.smoothing.procedures import procedure_of


def comparable(record: Record) -> dict[str, Any]:
    """The part of an identity that must agree for two runs to stand in one table."""
    kept = {k: v for k, v in record.identity.items() if k not in ("defense", "train_sigma", "seed")}
    return kept if record.imported else kept | {"base": {**kept["base"], "sha256": base_sha256(record)}}


def beside_sigma(record: Record) -> dict[str, Any]:
    """The part of an identity that must agree for two runs to be shown together at different sigmas."""
    same = {k: v for k, v in comparable(record).items() if k != "sigma"}
    return same | {"noise": {k: v for k, v in same["noise"].items() if k != "tau"}}  # tau follows from sigma


def base_sha256(record: Record) -> str:
    """The base's hash, that before the probe where it was given one."""
    return str(record.info["base"].get("before_probe", record.identity["base"]["sha256"]))


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Runs that may stand in one table together, by data set, split (test first) and sigma."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_key[digest(comparable(record))].append(record)
    tables = [sorted(g, key=lambda r: (method_name(r), r.identity["seed"] or 0)) for g in by_key.values()]
    return sorted(tables, key=_order)


def _order(group: Sequence[Record]) -> tuple[Any, ...]:
    identity = group[0].identity
    return identity["dataset"], identity["split"] != "test", identity["sigma"], digest(comparable(group[0]))


def methods(group: Sequence[Record]) -> list[list[Record]]:
    """The runs of each method of a table: those that differ in nothing but their seed and what it brings about."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        found[digest({"method": [*method_key(record), record.identity["train_sigma"]]})].append(record)
    apart: list[list[Record]] = []
    for records in found.values():
        same = len({r.identity["seed"] for r in records}) == len(records)
        apart += [records] if same else [[r] for r in records]
    return apart


def method_key(record: Record) -> list[Any]:
    """What two runs of one method have in common, beside the sigma they were trained at."""
    defense = record.identity["defense"]
    config = {k: v for k, v in defense["config"].items() if k not in searched(record)}
    given = record.info["defense"]["weights_file"] and defense["weights"]
    return [defense["name"], defense["source"], config, defense["objective"], given, defense.get("arithmetic")]


def searched(record: Record) -> set[str]:
    """The settings whose value was searched for."""
    return {key for tried in record.info["defense"]["search"] for key in tried["values"]}


def selects(record: Record) -> bool:
    """Whether the run predicts at all: one that tests the known label neither predicts nor abstains."""
    return bool(record.identity["procedure"].get("target", "selected") == "selected")


def setting(record: Record) -> str:
    """What any two runs that are compared have in common, in one line."""
    identity = record.identity
    p = identity["procedure"]
    selection = f"n0 {p['n0'] or 'not stated'}, " if selects(record) else "known label, "
    votes = f"n {p['n']:,}" if p["kind"] == "fixed" else f"{p['kind']} up to {p['n']:,} votes"
    return (
        f"{identity['dataset']}, sigma {identity['sigma']:g}: {len(identity['indices'])} {identity['split']} images, "
        f"{selection}{votes}, alpha {p['alpha']:g}, noise {identity['noise']['kind']}"
    )


def heading(record: Record) -> str:
    """What all runs of a table have in common, in one line."""
    base = record.identity["base"]
    known = "not stated" if record.imported else f"{base['name']} ({base_sha256(record)[:8]})"
    return f"{setting(record)}, base {known}"


def common(record: Record) -> str:
    """The same without data set and sigma."""
    return heading(record).partition(": ")[2]


def method_name(record: Record) -> str:
    """The defense, the settings and objective that are not its defaults, and what was searched."""
    defense, objective = record.info["defense"], record.identity["defense"]["objective"]
    words = [record.identity["defense"]["name"]]
    words += [k if v is True else f"{k}={v}" for k, v in defense["settings"].items()]
    words += [] if objective in (None, "gaussian") else [f"+ {objective}"]
    words += record.identity["defense"].get("arithmetic", [])
    keys = sorted(searched(record))
    return " ".join(words) + (f", {', '.join(keys)} searched" if keys else "")


def reach(record: Record) -> float:
    """The largest radius that any image of the record could be certified at."""
    identity = record.identity
    return procedure_of(identity).largest_radius(identity["sigma"], identity["noise"].get("tau", 0.0))
