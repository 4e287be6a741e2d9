"""Baselines of ``bench check``: what finished runs said, in one file that diffs well.

Sorted keys, one short line an image (index, certified radius or null where it is not right, n,
top_count). An entry is found again by its method and all that makes two runs comparable; the hash at
its end shows edits by hand and half-merged conflicts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.errors import BenchError, one_line
from bench.io import files, limits
from bench.io.files import digest
from bench.options import command
from bench.records import grouping, schema, verify
from bench.records.record import Record, find_runs, read_run

VERSION = 1
LARGEST = 256 * limits.MB
# Where these agree, the same identity must give the same counts. Threads may change the order of a sum.
MACHINE = ("device", "platform", "packages", "threads")
COSTS = ("votes", "forwards_per_vote", "parameters", "trained_here", "flops_per_vote")
ANY_BASE, SAME_BASE = "trained anew", "same weights"


def entry(record: Record) -> dict[str, Any]:
    """What a baseline keeps of a finished run."""
    identity, info = record.identity, record.info
    defense, searched = identity["defense"], grouping.searched(record)
    comparable = grouping.comparable(record)
    del comparable["indices"]  # those of the images below
    return {
        "name": f"{grouping.method_name(record)}, {identity['dataset']}, sigma {identity['sigma']:g}, "
        f"seed {identity['seed']}" + ("" if identity["split"] == "test" else f", {identity['split']} images"),
        "command": command(info["arguments"]),
        "method": {
            "name": defense["name"],
            "config": {k: v for k, v in defense["config"].items() if k not in searched},
            "searched": sorted(searched),
            "objective": defense["objective"],
            "train_sigma": identity["train_sigma"],
            "seed": identity["seed"],
            **{k: defense[k] for k in ("arithmetic",) if k in defense},  # none: plain float32
        },
        "comparable": comparable,
        "identity": {"sha256": digest(identity), **{k: defense[k] for k in ("source", "weights", "parts")}},
        "environment": {k: info["environment"].get(k) for k in MACHINE},
        "radii": [r for r in info["radii"] if r <= grouping.reach(record)],
        "cost": _cost(info["cost"]),
        "images": sorted(
            [c.index, c.radius if c.predicted == c.label else None, c.n, c.top_count] for c in record.certificates
        ),
    }


def _cost(cost: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared. Seconds are in units of the calibration timed before them, None where there was none."""
    kept = {k: cost.get(k) for k in COSTS}
    votes, forwards, unit = cost["votes"], cost["base_forwards"], cost.get("calibration_seconds")
    # Per vote, since an anytime procedure draws fewer votes by chance; rounded, as the record's total is.
    kept["forwards_per_vote"] = None if forwards is None else round(forwards / votes, 4)
    seconds = cost["certify_seconds"] / votes / unit if unit else None
    return kept | {"vote_in_calibrations": None if seconds is None else float(f"{seconds:.3g}")}


def terms(one: Mapping[str, Any], base: str) -> dict[str, Any]:
    """By what an entry is found again; the base's hash is left out where the baseline says it is trained anew."""
    comparable = dict(one["comparable"])
    if base == ANY_BASE:
        comparable["base"] = {k: v for k, v in comparable["base"].items() if k != "sha256"}
    return {**comparable, **one["method"], "indices": [image[0] for image in one["images"]]}


def read(file: Path) -> dict[str, Any]:
    """The baseline at ``file``. Raises BenchError where there is none, it is newer, or was edited."""
    try:
        found: dict[str, Any] = json.loads(limits.contents(file, LARGEST))
    except FileNotFoundError:
        raise BenchError(f"no baseline at {file}; bench check --baseline {file} RUNS --update makes one") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None
    version = found.get("certbench_baseline") if isinstance(found, dict) else None
    if type(version) is not int:
        raise BenchError(f"{file} is no baseline of bench check; name another file with --baseline")
    if version > VERSION:
        raise BenchError(f"{file}: version {version} is newer than this bench reads ({VERSION}); upgrade certbench")
    if found.get("base") not in (ANY_BASE, SAME_BASE) or not isinstance(found.get("runs"), list):
        raise BenchError(f"{file}: no base or runs in it; delete it, and --update makes it anew")
    for one in found["runs"]:
        if not isinstance(one, dict) or digest({k: v for k, v in one.items() if k != "sha256"}) != one.get("sha256"):
            name = one.get("name") if isinstance(one, dict) else one
            raise BenchError(
                f"{file}: the entry {str(name)!r:.80} was edited by hand; restore it, or delete the file and --update"
            )
    try:
        schema.check_entries(found["runs"])
    except BenchError as e:
        raise BenchError(f"{file}: not as bench check writes it: {e}; delete it, and --update makes it anew") from None
    return found


def write(file: Path, base: str, entries: list[dict[str, Any]]) -> None:
    """Atomically, innermost lists on one line each."""
    entries = [one | {"sha256": digest(one)} for one in sorted(entries, key=lambda e: (e["name"], digest(e)))]
    text = json.dumps({"certbench_baseline": VERSION, "base": base, "runs": entries}, indent=1, sort_keys=True)
    # A raw newline is never inside a JSON string, so only white space between values is taken out.
    text = re.sub(r"\[\n[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]).replace("[ ", "[")[:-2] + "]", text)
    with files.writing(file, "choose another file with --baseline"):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, text + "\n")


def trusted(path: Path) -> Record:
    """The finished run at ``path`` whose numbers follow from its counts. Raises BenchError for any other."""
    record = read_run(path)
    if not record.complete:
        raise BenchError(f"{path}: unfinished; type its bench run again to finish it")
    if record.imported:
        raise BenchError(f"{path}: imported, with neither counts nor cost; a baseline is of runs made here")
    if wrong := [finding.problem for finding in verify.check_record(path) if finding.problem]:
        raise BenchError(f"{path}: {wrong[0]}; bench verify {path} says more")
    return record


def update(file: Path, runs: Path, any_base: bool | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Write all finished runs in ``runs`` as the baseline, the old one's statement of the base kept unless given.

    The old baseline (None where there was none) and the new. Raises BenchError where a run is unfinished, does
    not hold, or is there twice.
    """
    old = read(file) if file.exists() else None
    base = (old or {"base": SAME_BASE})["base"] if any_base is None else ANY_BASE if any_base else SAME_BASE
    entries: dict[str, dict[str, Any]] = {}
    for path in find_runs(runs):
        one = entry(trusted(path))
        if entries.setdefault(digest(terms(one, base)), one) is not one:
            raise BenchError(f"{path}: {one['name']} is in {runs} twice; give bench run a new --out, or move one away")
    if not entries:
        raise BenchError(f"no finished run in {runs}; bench run makes one")
    write(file, base, list(entries.values()))
    return old, read(file)
