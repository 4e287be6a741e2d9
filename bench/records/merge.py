"""Join shards into the run that they are parts of, with the certificates that one process would have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.options import command
from bench.process.runlog import NAME, is_locked
from bench.records import fingerprint, grouping, metrics
from bench.records.lines import certificates_file, sha256
from bench.records.record import Record, read_run
from bench.records.schema import Cost, RunInfo
from bench.records.shards import Shard, shards_in
from bench.records.writer import RunFolder

SUMMED = ("certify_seconds", "votes", "base_forwards")
LARGEST = ("train_seconds", "queries", "peak_memory")  # paid or measured by each shard for the whole run
OF_ONE_PROCESS = ("calibration_seconds",)
OF_ONE_SHARD = ("shard", "audit")  # fields of run.json about a shard itself
OF_THE_RUN = (
    "status",
    "identity",
    "certificates_sha256",
    "cost",
    "metrics",
)  # stated by the merged run itself


@dataclass(frozen=True)
class Merged:
    """The runs that are now whole, and a line for each missing or unfinished shard: how to finish it."""

    whole: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def merge(root: Path) -> Merged:
    """Join the shards of the run at ``root``, or of every run directly below it.

    Raises BenchError where shards do not belong together or cannot be read.
    """
    runs = [root.resolve()] if shards_in(root) else sorted(p for p in root.glob("*") if shards_in(p))
    if not runs:
        raise BenchError(f"no shards in {root}; bench run --shard i/k makes them")
    found = Merged()
    for run in runs:
        missing = _merge(run)
        found.missing.extend(missing)
        found.whole.extend([] if missing else [run])
    return found


def _merge(run: Path) -> list[str]:
    """Join one run's shards. Returns a line for each that is missing, in which case nothing is written."""
    if (run / "run.json").exists() and read_run(run).complete:
        return []
    by_number: dict[int, dict[Shard, Record]] = {}
    for shard, folder in shards_in(run).items():
        by_number.setdefault(shard.of, {})[shard] = _read(run, shard, folder)
    first, *others = [record for found in by_number.values() for record in found.values()]
    for other in others:  # the name of a folder has only 32 bits of the identity's hash
        if other.identity.sha256 != first.identity.sha256:
            raise BenchError(f"{other.path}: a shard of another run than {first.path.name}; move one away")
    missing: list[str] = []
    for of, records in by_number.items():
        wanted = [Shard(i, of) for i in range(1, of + 1)]
        unfinished = [s for s in wanted if s not in records or not records[s].complete]
        if not unfinished:
            _check_functions(run, [records[s] for s in wanted])
            _write(run, [records[s] for s in wanted])
            return []
        missing += [_how_to_finish(run, s, records) for s in unfinished]
    return missing


def _check_functions(run: Path, shards: Sequence[Record]) -> None:
    """Raise BenchError naming the shards that certified another function than most of them did."""
    arithmetic = shards[0].identity.defense.arithmetic
    known = [(r.info.shard, r.info.fingerprint) for r in shards if r.info.fingerprint]  # older records have none
    agreeing = [[s for s, other in known if not fingerprint.differs(one, other, arithmetic)] for _, one in known]
    most = max(agreeing, key=len, default=[])
    if others := [(shard, one) for shard, one in known if shard not in most]:
        usual = next(one for shard, one in known if shard == most[0])
        raise BenchError(
            f"{run}: shard {', '.join(str(shard) for shard, _ in others)} certified another function than shard "
            f"{most[0]}: {fingerprint.differs(usual, others[0][1], arithmetic)}; find what changes its logits beyond "
            "the run's identity (a file, a helper module, the time), then delete that shard's folder and run it again"
        )


def _read(run: Path, shard: Shard, folder: Path) -> Record:
    record = read_run(folder, shard)
    if record.imported:
        raise BenchError(f"{folder}: an imported log, which has no shards; move it away")
    suffix = record.identity.folder_suffix
    if not run.resolve().name.endswith(suffix):
        raise BenchError(f"{folder}: its identity's hash is {suffix[1:]}: a shard of another run; move it away")
    if record.complete:
        if {c.index for c in record.certificates} != set(shard.part(record.identity.indices)):
            raise BenchError(f"{folder}: its images are not those of shard {shard}; delete it, and run it again")
        if sha256(certificates_file(folder)) != record.info.certificates_sha256:
            raise BenchError(
                f"{folder}: certificates.jsonl was changed since it was finished; delete it, and run it again"
            )
    return record


def _how_to_finish(run: Path, shard: Shard, records: dict[Shard, Record]) -> str:
    one = next(iter(records.values()))
    share = shard.part(one.identity.indices)
    state = f"{len(records[shard].certificates)} of {len(share)} images" if shard in records else "not begun"
    if shard in records and is_locked(records[shard].path / NAME):
        return f"{run}: shard {shard}: running, {state}"
    where = ["--device", one.identity.device or "auto", "--out", str(run.parent), "--shard", str(shard)]
    return f"{run}: shard {shard}: {state}; finish it: {command(one.info.arguments, *where)}"


def _write(run: Path, shards: Sequence[Record]) -> None:
    first = shards[0]
    done = {c.index: c for record in shards for c in record.counted}
    lines = [done[i] for i in first.identity.indices]
    try:
        info = _info(shards)
        cost = _cost([record.cost for record in shards])
    except BenchError as e:  # sums may leave the range that each of them is in
        raise BenchError(f"{run}: its shards together make no run: {e}; move away what bench did not write") from None
    name = run.resolve().name.removesuffix(first.identity.folder_suffix)
    merged = RunFolder(run.parent, name, info)
    try:
        merged.update(info)  # in place of what an unfinished run in one process wrote about itself
        merged.write(lines)
        merged.finish(cost, metrics.summarise(lines, info.radii))
    finally:
        merged.close()


def _info(shards: Sequence[Record]) -> RunInfo:
    """Return the run.json of the whole: that of the first shard, with what each shard states about itself."""
    parts = [record.info.as_json() for record in shards]
    kept = {k: v for k, v in parts[0].items() if k not in (*OF_ONE_SHARD, *OF_THE_RUN)}
    if any(part["radii"] != kept["radii"] for part in parts):  # of a table; they decide no certificate
        radii = grouping.table_radii(shards)
        kept |= {"radii": radii, "arguments": {**kept["arguments"], "radii": ",".join(map(repr, radii))}}
    return RunInfo.of(
        {
            "status": "started",
            "identity": parts[0]["identity"],
            **kept,
            "environment": _agreed([part["environment"] for part in parts]),
            "shards": [{k: part[k] for k in ("environment", "cost", *OF_ONE_SHARD) if k in part} for part in parts],
        }
    )


def _cost(costs: Sequence[Cost]) -> Cost:
    """Return the cost of the whole: trained once, certified in shards."""
    stored = [cost.as_json() for cost in costs]
    total = _agreed(stored)
    for names, combine in ((SUMMED, sum), (LARGEST, max)):
        for name in names:
            values = [cost[name] for cost in stored]
            total[name] = None if None in values else combine(values)
    return Cost.of(total | dict.fromkeys(OF_ONE_PROCESS))


def _agreed(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is the same in all; None for the rest."""
    return {k: v if all(other.get(k) == v for other in values) else None for k, v in values[0].items()}
