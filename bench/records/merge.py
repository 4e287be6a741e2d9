"""Shards joined into the run they are shares of: the same certificates as one process would have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.io.files import digest, file_sha256
from bench.options import command
from bench.process.runlog import NAME, is_locked
from bench.records import fingerprint, metrics, schema
from bench.records.record import Record, Run, read_run
from bench.records.shards import Shard, shards_in

# What adds up over shards; what each paid or saw alike, of which the most counts; what is of one process.
ADDED = ("certify_seconds", "votes", "base_forwards")
MOST = ("train_seconds", "queries", "peak_memory")
OWN = ("calibration_seconds",)
OF_ONE = ("shard", "audit")  # what a shard's run.json says of itself alone


def merge(root: Path) -> tuple[list[Path], list[str]]:
    """Join the shards of the run at ``root``, or of every run directly below it.

    Returns the runs that are now whole, and a line for each shard that is missing or unfinished, with the command
    that finishes it. Raises BenchError where shards do not belong together or cannot be read.
    """
    runs = [root.resolve()] if shards_in(root) else sorted(p for p in root.glob("*") if shards_in(p))
    if not runs:
        raise BenchError(f"no shards in {root}; bench run --shard i/k makes them")
    whole, missing = [], []
    for run in runs:
        lacks = _merge(run)
        missing += lacks
        whole += [] if lacks else [run]
    return whole, missing


def _merge(run: Path) -> list[str]:
    """Make the run whole; what it lacks, in which case nothing is written."""
    if (run / "run.json").exists() and read_run(run).complete:
        return []
    by_number: dict[int, dict[Shard, Record]] = {}
    for shard, folder in shards_in(run).items():
        by_number.setdefault(shard.of, {})[shard] = _read(run, shard, folder)
    first, *others = [record for found in by_number.values() for record in found.values()]
    for other in others:  # a folder's name has 32 bits of the identity's hash alone
        if other.identity != first.identity:
            raise BenchError(f"{other.path}: a shard of another run than {first.path.name}; move one away")
    lacks: list[str] = []
    for of, records in by_number.items():
        wanted = [Shard(i, of) for i in range(1, of + 1)]
        unfinished = [s for s in wanted if s not in records or not records[s].complete]
        if not unfinished:
            _check_functions(run, [records[s] for s in wanted])
            _write(run, [records[s] for s in wanted])
            return []
        lacks += [_lack(run, s, records) for s in unfinished]
    return lacks


def _check_functions(run: Path, shards: Sequence[Record]) -> None:
    """Raise BenchError naming the shards that certified another function than most of them did."""
    stated = [r for r in shards if r.info.get("fingerprint")]  # older records have none
    arithmetic = shards[0].identity["defense"].get("arithmetic", [])

    def problem(one: Record, other: Record) -> str:
        return fingerprint.differs(one.info["fingerprint"], other.info["fingerprint"], arithmetic)

    agreeing = [[other for other in stated if not problem(one, other)] for one in stated]
    most = max(agreeing, key=len, default=[])
    if others := [r for r in stated if r not in most]:
        names = ", ".join(r.info["shard"] for r in others)
        raise BenchError(
            f"{run}: shard {names} certified another function than shard {most[0].info['shard']}: "
            f"{problem(most[0], others[0])}; find what decides its logits outside of the run's identity (a file, a "
            "helper module, the time), then delete that shard's folder and run it again"
        )


def _read(run: Path, shard: Shard, folder: Path) -> Record:
    record = read_run(folder, shard)
    if record.imported:
        raise BenchError(f"{folder}: an imported log, of which there are no shards; move it away")
    wanted = digest(record.identity)[:8]
    if not run.resolve().name.endswith(f"-{wanted}"):
        raise BenchError(f"{folder}: its identity's hash is {wanted}, so it is a shard of another run; move it away")
    if record.complete:
        if {c.index for c in record.certificates} != set(shard.part(record.identity["indices"])):
            raise BenchError(f"{folder}: its images are not those of shard {shard}; delete it, and run it again")
        if file_sha256(folder / "certificates.jsonl") != record.info["certificates_sha256"]:
            raise BenchError(
                f"{folder}: certificates.jsonl was changed since it was finished; delete it, and run it again"
            )
    return record


def _lack(run: Path, shard: Shard, records: dict[Shard, Record]) -> str:
    one = next(iter(records.values()))
    share = shard.part(one.identity["indices"])
    state = f"{len(records[shard].certificates)} of {len(share)} images" if shard in records else "not begun"
    if shard in records and is_locked(records[shard].path / NAME):
        return f"{run}: shard {shard}: running, {state}"
    where = ["--device", one.identity.get("device") or "auto", "--out", str(run.parent), "--shard", str(shard)]
    return f"{run}: shard {shard}: {state}; finish it: {command(one.info['arguments'], *where)}"


def _write(run: Path, shards: Sequence[Record]) -> None:
    identity, first = shards[0].identity, shards[0].info
    done = {c.index: c for record in shards for c in record.counted}
    environments = [record.info["environment"] for record in shards]
    extra = {
        k: v for k, v in first.items() if k not in (*OF_ONE, "schema", "status", "identity", "certificates_sha256")
    }
    extra["environment"] = _agreed(environments)
    extra["shards"] = [{k: s.info[k] for k in ("environment", "cost", *OF_ONE) if k in s.info} for s in shards]
    lines = [done[i] for i in identity["indices"]]
    cost, summary = _cost([record.info["cost"] for record in shards]), metrics.summarise(lines, first["radii"])
    whole = extra | {"status": "complete", "identity": identity, "cost": cost, "metrics": summary}
    try:
        schema.check(whole | {"certificates_sha256": None})
    except BenchError as e:  # sums may leave the range that each of them is in
        raise BenchError(f"{run}: its shards together make no run: {e}; move away what bench did not write") from None
    name = run.resolve().name.removesuffix(f"-{digest(identity)[:8]}")
    merged = Run(run.parent, name, identity, extra)
    try:
        merged.info |= extra  # in place of what an unfinished run in one process wrote of itself
        merged.write(lines)
        merged.finish(cost, summary)
    finally:
        merged.close()


def _cost(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole: certified in shares, trained once."""
    total = _agreed(costs)
    total |= {k: _known(sum, [cost[k] for cost in costs]) for k in ADDED}
    return total | {k: _known(max, [cost[k] for cost in costs]) for k in MOST} | dict.fromkeys(OWN)


def _known(of: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """None where one of the values is."""
    return None if None in values else of(values)


def _agreed(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is the same in all; None where it is not."""
    return {k: v if all(other.get(k) == v for other in values) else None for k, v in values[0].items()}
