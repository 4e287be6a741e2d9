"""Write run folders, one process at a time, so that a killed run loses at most the line being written.

``run.json`` is replaced atomically; ``certificates.jsonl`` is appended to, one line per image as it is certified. An
incomplete last line is ignored when read, and dropped when the run goes on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.io.files import drop_partial, file_sha256, write_json, write_text, writing
from bench.process import runlog
from bench.process.locks import Lock
from bench.records.columns import Columns
from bench.records.lines import NAME, certificates_file
from bench.records.metrics import Summary
from bench.records.record import Line, read_run
from bench.records.schema import Cost, Identity, RunInfo
from bench.records.shards import Shard
from bench.smoothing.votes import Certificate

ELSEWHERE = "choose another folder with --out"
SPACE = "all certificates so far are kept: free space there, and repeat the command to resume"
_ORDER = ("index", "label", "predicted", "radius", "n0", "n", "top_count", "runner_up", "runner_up_count", "p_lower")


def run_folder(out: Path, name: str, identity: Identity) -> Path:
    """Return the folder of an identity's run below ``out``."""
    return out / f"{name}{identity.folder_suffix}"


def check_writable(out: Path) -> None:
    """Raise BenchError where no run folder can be made in ``out``, before anything is trained in vain."""
    with writing(out, ELSEWHERE):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as f:
            f.write(b"\0")


class RunFolder:
    """A run folder that this process writes: created, or resumed where it exists."""

    def __init__(self, out: Path, name: str, info: RunInfo, shard: Shard | None = None) -> None:
        """Lock ``out/name-<hash8>``, or the shard's folder in it, and write ``info`` there or read what is there.

        Raises BenchError when it cannot be written, is not readable, or another process writes it.
        """
        self.path = run_folder(out, name, info.identity)
        if shard:
            self.path /= shard.folder
            info = info.replace(shard=str(shard))
        with writing(self.path, ELSEWHERE):
            self.path.mkdir(parents=True, exist_ok=True)
            if linked := sorted(f.name for f in self.path.iterdir() if f.is_symlink()):
                raise BenchError(f"{self.path / linked[0]} is a link, and bench writes through none; move it away")
            self._lock = Lock(self.path, named=False)  # its log names the process that writes it
            if not self._lock.take():
                who = self._lock.held_by() or runlog.writer(self.path / runlog.NAME)
                raise BenchError(f"{self.path} is being written by another process{who}; wait for it, or stop it")
        try:
            self._certificates = certificates_file(self.path)
            self.info, self.done = self._open(info, shard)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, info: RunInfo, shard: Shard | None) -> tuple[RunInfo, Columns[Certificate]]:
        with writing(self.path, ELSEWHERE):
            drop_partial(self.path)
        if not (self.path / "run.json").exists():
            with writing(self.path, SPACE):
                write_json(self.path / "run.json", info.as_json())
            return info, Columns(Certificate)
        record = read_run(self.path, shard)
        if record.identity.sha256 != info.identity.sha256:
            raise BenchError(f"{self.path} holds another identity than its name says; move it away")
        if self._certificates.name != NAME:
            if not record.complete:
                raise BenchError(f"{self._certificates}: a compressed run that is not finished; unpack it with gunzip")
            return record.info, record.counted
        with writing(self._certificates, SPACE):
            self._drop_torn_line()
        return record.info, record.counted

    def update(self, info: RunInfo | None = None, **changes: Any) -> None:
        """Write run.json with these fields changed; ``info``: in place of all its fields."""
        self.info = (info or self.info).replace(**changes)
        with writing(self.path, SPACE):
            write_json(self.path / "run.json", self.info.as_json())

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
        """Write all lines of an imported log or of shards, in place of those that were there."""
        with writing(self._certificates, SPACE):
            write_text(self._certificates, "".join(map(_as_json, lines)))

    def finish(self, cost: Cost, summary: Summary) -> None:
        """Mark the run complete, with the hash of its certificates."""
        sha256 = file_sha256(self._certificates)
        self.update(status="complete", certificates_sha256=sha256, cost=cost, metrics=summary.as_json())

    def set_aside(self) -> Path:
        """Move all certificates out of the record, as unsound; return the file that holds them."""
        aside = self.path / "refused.jsonl"
        with writing(self.path, SPACE):
            self._certificates.replace(aside)
        self.done = Columns(Certificate)
        kept = {k: v for k, v in self.info.as_json().items() if k != "fingerprint"}
        self.update(RunInfo.of(kept))  # what comes next may be another function
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
