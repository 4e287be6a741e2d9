"""Run folders: the record of one defense certified at one sigma.

``run.json`` says what was measured (identity), where (environment), at what cost, with which
result; ``certificates.jsonl`` has one line per image, appended as it is certified. A killed run
loses at most the line being written, which is dropped and redone.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from bench.errors import BenchError, one_line
from bench.io import limits
from bench.io.files import digest, drop_partial, file_sha256, write_json, write_text, writing
from bench.process import runlog
from bench.process.locks import Lock
from bench.records import schema
from bench.records.columns import Columns
from bench.records.shards import Shard, shards_in
from bench.smoothing.votes import Certificate

SCHEMA = 3
ELSEWHERE = "choose another folder with --out"
SPACE = "all certified before is kept: free space there, and type the same command again"
_ORDER = ("index", "label", "predicted", "radius", "n0", "n", "top_count", "runner_up", "runner_up_count", "p_lower")


@dataclass(frozen=True)
class Claim:
    """One image of an imported log: what the log says of it. The counts it should follow from are not known (null)."""

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


Line = Certificate | Claim


@dataclass(frozen=True)
class Record:
    """A run folder as read: its run.json and its certificates, in the order in which they were written."""

    path: Path
    info: dict[str, Any]
    certificates: Columns[Line]

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the certificates."""
        identity: dict[str, Any] = self.info["identity"]
        return identity

    @property
    def imported(self) -> bool:
        """Whether it was made of a released log, so that all its lines are claims."""
        return "imported" in self.identity

    @property
    def counted(self) -> Columns[Certificate]:
        """The certificates with counts: all, or none of an imported log's."""
        return Columns(Certificate) if self.imported else cast(Columns[Certificate], self.certificates)

    @property
    def flags(self) -> list[str]:
        """What was found wrong with an imported log."""
        return list(self.info.get("flags", ()))

    @property
    def whole(self) -> bool:
        """Whether the images certified are those of the identity, no more and no fewer."""
        wanted = np.array(self.identity.get("indices", []), np.int64)
        return np.array_equal(np.sort(self.certificates.column("index")), np.sort(wanted))

    @property
    def complete(self) -> bool:
        """Whether every image was certified."""
        return bool(self.info["status"] == "complete")


def run_folder(out: Path, name: str, identity: dict[str, Any]) -> Path:
    """Where the run of an identity is below ``out``."""
    return out / f"{name}-{digest(identity)[:8]}"


def check_writable(out: Path) -> None:
    """Raise BenchError where no run folder can be made in ``out``, before anything is trained in vain."""
    with writing(out, ELSEWHERE):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as f:
            f.write(b"\0")


class Run:
    """An open run folder, one writer at a time; made on first use, continued ever after."""

    def __init__(
        self, out: Path, name: str, identity: dict[str, Any], extra: dict[str, Any], shard: Shard | None = None
    ) -> None:
        """Open or create ``out/name-<hash8>``, or the shard's folder in it.

        Raises BenchError when it cannot be written or is not readable.
        """
        self.path = run_folder(out, name, identity)
        if shard:
            self.path /= shard.folder
            extra = {"shard": str(shard), **extra}
        with writing(self.path, ELSEWHERE):
            self.path.mkdir(parents=True, exist_ok=True)
            if linked := sorted(f.name for f in self.path.iterdir() if f.is_symlink()):
                raise BenchError(f"{self.path / linked[0]} is a link, through which nothing is written; move it away")
            self._lock = Lock(self.path, named=False)  # its log says who writes it
            if not self._lock.take():
                who = self._lock.held_by() or runlog.writer(self.path / runlog.NAME)
                raise BenchError(f"{self.path} is being written by another process{who}; wait for it, or stop it")
        try:
            self._open(identity, extra, shard)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, identity: dict[str, Any], extra: dict[str, Any], shard: Shard | None) -> None:
        self._certificates = self.path / "certificates.jsonl"
        with writing(self.path, ELSEWHERE):
            drop_partial(self.path)
        if (self.path / "run.json").exists():
            record = read_run(self.path, shard)
            if record.identity != json.loads(json.dumps(identity)):
                raise BenchError(f"{self.path} holds another identity than its name says; move it away")
            self.info = record.info
            self.done = record.counted
            with writing(self._certificates, SPACE):
                self._drop_torn_line()
        else:
            self.info = {"schema": SCHEMA, "status": "started", "identity": identity, **extra}
            self.done = Columns(Certificate)
            with writing(self.path, SPACE):
                write_json(self.path / "run.json", self.info)

    def state(self, **more: Any) -> None:
        """Add to what run.json says."""
        self.info |= more
        with writing(self.path, SPACE):
            write_json(self.path / "run.json", self.info)

    def append(self, certificate: Certificate) -> None:
        """Add one line and hand it to the operating system. Raises BenchError where it cannot be, and adds nothing."""
        with writing(self._certificates, SPACE):
            try:
                with self._certificates.open("a") as f:
                    f.write(_as_json(certificate))
            except OSError:
                self._drop_torn_line()
                raise
        self.done.append(certificate)

    def write(self, lines: Iterable[Line]) -> None:
        """All lines of an imported log or of shards, in place of what there is."""
        with writing(self._certificates, SPACE):
            write_text(self._certificates, "".join(map(_as_json, lines)))

    def finish(self, cost: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Mark the run complete, with the hash of its certificates."""
        self.state(status="complete", certificates_sha256=file_sha256(self._certificates), cost=cost, metrics=metrics)

    def set_aside(self) -> Path:
        """Take all certificates out of the record, since what they were made with proved unsound; where they are."""
        aside = self.path / "refused.jsonl"
        with writing(self.path, SPACE):
            self._certificates.replace(aside)
        self.done = Columns(Certificate)
        self.info.pop("fingerprint", None)  # what comes next may be another function
        self.state()
        return aside

    def close(self) -> None:
        """Let another process write."""
        self._lock.release()

    def _drop_torn_line(self) -> None:
        if not self._certificates.exists():
            return
        text = self._certificates.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with self._certificates.open("r+b") as f:
                f.truncate(whole)


def _as_json(line: Line) -> str:
    value = asdict(line)
    return json.dumps({k: value[k] for k in (*_ORDER, "votes", "seconds")}) + "\n"


def read_run(path: Path, shard: Shard | None = None) -> Record:
    """The record at ``path``, of a whole run or of that shard of one.

    Raises BenchError when it is not a run folder, of a newer schema, or corrupt.
    """
    file = path / "run.json"
    try:
        data = limits.contents(file, limits.RUN)
        info = json.loads(data)
        if re.search(rb"\\u[dD][89a-fA-F]", data):
            info = _characters(info)
    except (FileNotFoundError, NotADirectoryError):
        if shards_in(path):
            raise BenchError(f"{path}: only shards of a run; bench merge {path} joins them") from None
        raise BenchError(f"{path} is no run folder (it has no run.json)") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None
    version = info.get("schema") if isinstance(info, dict) else None
    if type(version) is not int:
        raise BenchError(f"{file}: no schema version: not written by bench")
    if version > SCHEMA:
        raise BenchError(f"{file}: schema {version} is newer than this bench reads ({SCHEMA}); upgrade certbench")
    missing = [k for k, kind in (("status", str), ("identity", dict)) if not isinstance(info.get(k), kind)]
    if missing:
        raise BenchError(f"{file}: no {missing[0]!r} in it")
    info = _migrated(info, version)
    if info.get("shard") != (str(shard) if shard else None):
        found = f"shard {info['shard']!s:.20} of a run" if "shard" in info else "a whole run"
        raise BenchError(f"{path}: {found}; bench merge {path.parent} joins shards")
    try:
        schema.check(info)
    except BenchError as e:
        raise BenchError(f"{file}: not as bench writes it, so move it away: {e}") from None
    return Record(path, info, _certificates(path / "certificates.jsonl", info))


def _characters(value: Any) -> Any:
    """The same with half a surrogate pair, which no file or table can hold, written as its number."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_characters(k): _characters(v) for k, v in value.items()}
    return [_characters(v) for v in value] if isinstance(value, list) else value


def _migrated(info: dict[str, Any], schema: int) -> dict[str, Any]:
    """What an older bench wrote, in today's form; what it did not record is None."""
    if schema < 2:  # before shared parts, settings in names, and the hash of the certificates
        if isinstance(made := info.setdefault("defense", {}), dict):
            made.update({"settings": {}, "search": [], "trained_elsewhere": []})
        info |= {"certificates_sha256": None, "environment": info.get("environment", {})}
        info |= {"arguments": info.get("arguments", {})}
        if isinstance(info.get("cost"), dict):
            info["cost"].update(trained_here=info["cost"].get("trainable_nominal"), trained_elsewhere=0)
    # Before schema 3 the sort of a method and what it trains were one thing.
    if schema < 3 and isinstance(defense := info.setdefault("defense", {}), dict):
        family = defense.get("family")
        defense.update(trains=family, family="imported" if family == "imported" else "")
    return info


def _certificates(file: Path, info: dict[str, Any]) -> Columns[Line]:
    kind: type[Line] = Claim if "imported" in info["identity"] else Certificate
    found = Columns(kind)
    if not file.exists():
        return found
    most = len(info["identity"]["indices"])
    try:
        for number, line in enumerate(limits.lines(file, limits.CERTIFICATE), 1):
            if not line.endswith(b"\n"):  # torn by a crash: as if never written
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
        schema.check_lines(found, kind is Certificate, len(info["classes"]))
    except BenchError as e:
        raise BenchError(f"{file}: {e}") from None
    return found


def find_runs(root: Path) -> list[Path]:
    """The run folders at or directly below ``root``, by name."""
    if (root / "run.json").exists():
        return [root]
    return sorted({f.parent for f in root.glob("*/run.json")} | {f.parents[1] for f in root.glob("*/shard-*/run.json")})
