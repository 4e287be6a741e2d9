"""Copy records to a repository: run.json and compressed certificates, without weights, logs and paths of a machine.

``bench report``, ``compare`` and ``verify`` read a copy as they read the run. A run's log is left behind, since it
names processes and folders; weights stay in the cache, so ``verify`` draws votes again only where they are cached.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.io import limits
from bench.io.files import replacing, write_json, writing
from bench.records import attacks, audit, lines
from bench.records.record import Record

# Folders of an absolute path or of ~, not those of a URL. A path with blanks is cut at the last blank.
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:~[\w.-]*)?/(?=[^/\s])(?:[^/\s,;='\"]+/)*|\b[A-Za-z]:\\(?:[^\\\s,;='\"]+\\)*")


def copy_record(record: Record, out: Path) -> tuple[Path, list[str]]:
    """Write a copy of a finished run into ``out``, in place of an earlier copy.

    Returns:
        The folder, and a line for each field whose path was shortened to its last name.

    Raises:
        BenchError: The run is imported, unfinished or does not pass its audit, or the copy cannot be written.
    """
    if record.imported:
        raise BenchError(f"{record.path}: an imported log; keep the log, and import it again where it is needed")
    if problem := audit.problem(record):
        raise BenchError(problem)
    folder = out / record.path.resolve().name
    if (folder / lines.NAME).exists():
        raise BenchError(f"{folder} is a run, not a copy of one; choose another folder with --record")
    info, changed = {}, list[str]()
    for key, value in record.info.as_json().items():
        info[key] = _without_folders(value, key, changed)
    if wrong := next((line for line in changed if line.startswith("identity")), None):
        raise BenchError(f"{record.path}: {wrong}: the identity names a folder of this machine, and cannot be changed")
    with writing(folder, "choose another place with --record"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / lines.COMPRESSED) as partial:
            partial.write_bytes(lines.compressed(lines.certificates_file(record.path)))
        if (file := attacks.attacks_file(record.path)).exists():
            with replacing(folder / attacks.COMPRESSED) as partial:
                partial.write_bytes(gzip.compress(b"".join(limits.lines(file, attacks.LINE)), mtime=0))
        write_json(folder / "run.json", info)
    return folder, changed


def _without_folders(value: Any, where: str, changed: list[str]) -> Any:
    """Return a JSON value with the folders of absolute paths removed; add a line to ``changed`` for each."""
    if isinstance(value, dict):
        return {k: _without_folders(v, f"{where}.{k}", changed) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v, where, changed) for v in value]
    if not isinstance(value, str):
        return value
    short = _FOLDERS.sub("", value)
    if short != value:
        changed.append(f"{where}: {value} is written as {short}")
    return short
