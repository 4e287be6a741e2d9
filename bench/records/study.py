"""The results of a study file: its text, and the run folder of each of its runs, in ``NAME.study.json`` beside them.

A report of a study reads this file and run folders alone. It is untrusted input, as records are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from pydantic import model_validator as validator

from bench.errors import BenchError, one_line
from bench.io import limits
from bench.io.files import write_json, writing
from bench.process.locks import Lock
from bench.records.record import RUNS
from bench.records.stored import Stored, parse_json
from bench.records.writer import ELSEWHERE

SUFFIX = ".study.json"
LARGEST = limits.MB  # bytes of a study file
LARGEST_RESULTS = 64 * limits.MB


class StudyRun(Stored):
    """One run of a study. ``folder`` is the name of its run folder; None until that is known."""

    label: str
    arguments: dict[str, Any]
    folder: Annotated[str, Field(pattern=r"^[^/\\]+$", max_length=255)] | None = None


class Study(Stored):
    """A study file as it was run, and its runs in the order of the file."""

    version: Literal[1] = Field(alias="schema")
    name: str
    sha256: str
    text: str
    runs: list[StudyRun]

    @validator(mode="after")
    def _consistent(self) -> Self:
        if self.sha256 != hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest():
            raise ValueError("sha256: not that of text; one of them was changed")
        return self


def started(name: str, text: str, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Study:
    """Return the results of a study before its first run; ``runs``: the label and the arguments of each."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    entries = [{"label": label, "arguments": dict(arguments)} for label, arguments in runs]
    return Study.of({"schema": 1, "name": name, "sha256": sha256, "text": text, "runs": entries})


def resumed(out: Path, study: Study) -> Study:
    """Return a study with the folders that the results of an earlier command name for its runs in ``out``."""
    file = results_file(out, study.name)
    before = read_study(file).runs if file.exists() else []
    runs = []
    for run in study.runs:
        same = (other.folder for other in before if other.arguments == run.as_json()["arguments"])
        runs.append(run.replace(folder=run.folder or next(filter(None, same), None)))
    return study.replace(runs=runs)


def results_file(out: Path, name: str) -> Path:
    """Return the file of a study's results in the folder of its runs; ``name``: of the study file."""
    return out / f"{Path(name).stem}{SUFFIX}"


def read_study(file: Path) -> Study:
    """Read a study's results. Raises BenchError where they are missing or corrupt."""
    try:
        return Study.of(parse_json(limits.contents(file, LARGEST_RESULTS)))
    except OSError as e:
        raise BenchError(f"{file}: {e.strerror}") from None
    except BenchError as e:
        raise BenchError(f"{file}: {e}; repeat bench run with the study file to write it again") from None
    except (ValueError, RecursionError) as e:
        raise BenchError(f"{file}: not JSON: {one_line(e)}; repeat bench run with the study file") from None


class StudyWriter:
    """The results of a study that this process runs. Other processes may write other runs of it (``--shard``)."""

    def __init__(self, out: Path, study: Study) -> None:
        """Write the file, with the folders that an earlier run of the study named. Raises BenchError."""
        self._out, self._file = out, results_file(out, study.name)
        self.study = study
        self._update({})

    def finished(self, number: int, folder: str) -> None:
        """Name the folder of a run, counted from 0."""
        self._update({number: folder})

    def _update(self, folders: Mapping[int, str]) -> None:
        lock = Lock(self._out, named=False)
        with writing(self._file, ELSEWHERE):
            lock.wait()
            try:
                runs = [run.replace(folder=folders.get(n) or run.folder) for n, run in enumerate(self.study.runs)]
                self.study = resumed(self._out, self.study.replace(runs=runs))
                write_json(self._file, self.study.as_json())
            finally:
                lock.release()


def find_study(path: Path) -> Path | None:
    """Return the file of the results that ``path`` names; None where it is no study.

    ``path`` is a study file, a file of results, or a folder with the results of one study in its folder ``runs``.
    Raises BenchError where a study file has no results, or a folder those of several studies.
    """
    if path.name.endswith(SUFFIX):
        return path
    if path.suffix == ".toml":
        if not path.is_file():
            raise BenchError(f"no study file {path}")
        if not (file := results_file(path.parent / RUNS, path.name)).exists():
            raise BenchError(
                f"no results of {path} in {file.parent}; bench run {path} makes them, and where it had --out OUT, "
                f"give OUT/{file.name}"
            )
        return file
    found = sorted((path / RUNS).glob(f"*{SUFFIX}"))
    if not found or (path / "run.json").exists():
        return None
    if len(found) > 1:
        raise BenchError(f"{path} has {len(found)} studies; give one: {', '.join(map(str, found))}")
    return found[0]


def home(path: Path) -> Path:
    """Return the folder for the pages of the study that ``path`` names."""
    return path.parent if path.is_file() else path


def run_folders(file: Path) -> tuple[Study, list[Path], list[str]]:
    """Return a study, the folders of its runs, and a line on those that are missing.

    Raises BenchError where the results cannot be read.
    """
    study = read_study(file)
    folders, missing = [], []
    for run in study.runs:
        named = run.folder is not None and run.folder not in (".", "..")
        if named and (file.parent / str(run.folder) / "run.json").exists():
            folders.append(file.parent / str(run.folder))
        else:
            missing.append(run.label)
    lines = []
    if missing:
        lines.append(f"{study.name}: {len(missing)} of {len(study.runs)} runs are not finished: {'; '.join(missing)}")
    return study, list(dict.fromkeys(folders)), lines


def changed_since(path: Path, study: Study) -> str | None:
    """Return a line where the study file at ``path`` is not the text that was run."""
    if path.suffix != ".toml" or limits.contents(path, LARGEST).decode(errors="replace") == study.text:
        return None
    return f"{path} was changed since it was run, so its results are of another text; repeat bench run {path}"
