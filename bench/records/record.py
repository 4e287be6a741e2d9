"""Read run folders: the record of one defense certified at one sigma.

``run.json`` states what was measured (identity), where (environment), at what cost and with what result;
``certificates.jsonl`` has one line per image. ``writer`` writes both. ``copying`` writes copies with compressed lines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from bench.errors import BenchError, one_line
from bench.io import limits
from bench.records.columns import NULL, Columns
from bench.records.lines import certificates_file
from bench.records.migration import migrate
from bench.records.schema import Cost, Identity, RunInfo
from bench.records.shards import Shard, shards_in
from bench.records.stored import parse_json
from bench.smoothing.votes import Certificate

RUNS = "runs"  # the folder of the runs of a study, or of a published folder


@dataclass(frozen=True)
class ImportedCertificate:
    """One image of a released log, as the log states it. The counts behind it are not known (None)."""

    index: int
    label: int
    predicted: int | None
    radius: float
    votes: int | None = None
    seconds: float | None = None
    n0: None = None
    n: None = None
    top_count: None = None
    runner_up: None = None
    runner_up_count: None = None
    p_lower: None = None


Line = Certificate | ImportedCertificate


@dataclass(frozen=True)
class Record:
    """A run folder as read: its run.json, and its certificates in the order in which they were written."""

    path: Path
    info: RunInfo
    certificates: Columns[Line]

    @property
    def identity(self) -> Identity:
        """All that determines the certificates."""
        return self.info.identity

    @property
    def imported(self) -> bool:
        """Whether it was made from a released log, so that its lines state no counts."""
        return self.info.imported

    @property
    def counted(self) -> Columns[Certificate]:
        """The certificates with counts: all of them, or none of an imported log."""
        return Columns(Certificate) if self.imported else cast(Columns[Certificate], self.certificates)

    def stopped(self, line: Line) -> bool:
        """Whether an image got no votes to bound its class: target "correct" stops where the class is not the label."""
        return self.identity.sampling.target == "correct" and line.predicted not in (None, line.label)

    @property
    def flags(self) -> list[str]:
        """Defects of an imported log."""
        return self.info.flags

    @property
    def cost(self) -> Cost:
        """What the run cost. Only a finished run has it."""
        assert self.info.cost is not None, f"{self.path} is not finished"
        return self.info.cost

    @property
    def whole(self) -> bool:
        """Whether the certified images are exactly those of the identity."""
        wanted = np.array(self.identity.indices, np.int64)
        return np.array_equal(np.sort(self.certificates.column("index")), np.sort(wanted))

    @property
    def complete(self) -> bool:
        """Whether every image was certified."""
        return self.info.complete


def read_run(path: Path, shard: Shard | None = None) -> Record:
    """Read the record at ``path``, of a whole run or of that shard of one.

    Raises BenchError when it is not a run folder, of a newer schema, or corrupt.
    """
    info = _read_info(path, shard)
    return Record(path, info, _certificates(certificates_file(path), info))


def _read_info(path: Path, shard: Shard | None) -> RunInfo:
    file = path / "run.json"
    try:
        found = parse_json(limits.contents(file, limits.RUN))
    except (FileNotFoundError, NotADirectoryError):
        if shards_in(path):
            raise BenchError(f"{path}: only shards of a run; bench merge {path} joins them") from None
        raise BenchError(f"{path} is no run folder (it has no run.json)") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None
    try:
        stored = migrate(found)
    except BenchError as e:
        raise BenchError(f"{file}: {e}") from None
    if stored.get("shard") != (str(shard) if shard else None):
        what = f"shard {stored['shard']!s:.20} of a run" if "shard" in stored else "a whole run"
        raise BenchError(f"{path}: {what}; bench merge {path.parent} joins shards")
    try:
        return RunInfo.of(stored)
    except BenchError as e:
        raise BenchError(f"{file}: not as bench writes it, so move it away: {e}") from None


def _certificates(file: Path, info: RunInfo) -> Columns[Line]:
    kind: type[Line] = ImportedCertificate if info.imported else Certificate
    found = Columns(kind)
    if not file.exists():
        return found
    most = len(info.identity.indices)
    try:
        for number, line in enumerate(limits.lines(file, limits.CERTIFICATE), 1):
            if not line.endswith(b"\n"):  # torn by a crash: an incomplete last line is ignored
                break
            if number > most:
                raise BenchError(f"{file}:{number}: more lines than run.json has images, {most}; move the folder away")
            try:
                found.add(json.loads(line))
            except (ValueError, AttributeError, RecursionError, OverflowError) as e:
                raise BenchError(f"{file}:{number}: not a certificate: {one_line(e)}") from None
    except OSError as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None
    indices = found.column("index")
    order = indices.argsort(kind="stable")
    again = order[1:][np.diff(indices[order]) == 0]
    if len(again):
        raise BenchError(f"{file}:{again.min() + 1}: image {indices[again.min()]} is certified twice")
    try:
        _check_lines(found, kind is Certificate, len(info.classes))
    except BenchError as e:
        raise BenchError(f"{file}: {e}") from None
    return found


def _check_lines(lines: Columns[Line], counted: bool, classes: int) -> None:
    """Raise BenchError where a line holds what no image can have; ``classes``: 0 where not known."""
    names = ["index", "label", "predicted", "votes"]
    names += ["n0", "n", "top_count", "runner_up", "runner_up_count"] if counted else []
    for name in names:
        values = lines.column(name)
        wrong = (values < 0) & (values != NULL)
        if counted and classes and name in ("label", "predicted"):
            wrong |= values >= classes
        if wrong.any():
            raise BenchError(f"image {lines.column('index')[wrong.argmax()]}: {name} is {values[wrong.argmax()]}")
    for name in ("radius", "seconds", *(["p_lower"] if counted else [])):
        values = lines.column(name)
        wrong = (np.abs(values) >= 1e30) | ((values < 0) & (name == "radius"))
        if wrong.any():
            raise BenchError(f"image {lines.column('index')[wrong.argmax()]}: {name} is {values[wrong.argmax()]}")


def find_runs(root: Path) -> list[Path]:
    """Return the run folders at or directly below ``root``, or else in its folder ``runs``, by name."""
    if (root / "run.json").exists():
        return [root]
    for place in (root, root / RUNS):
        shards = {f.parents[1] for f in place.glob("*/shard-*/run.json")}
        if found := sorted({f.parent for f in place.glob("*/run.json")} | shards):
            return found
    return []
