"""Lay out a published folder: the runs, their study, the weights asked for, and the model card over all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.io import limits
from bench.io.files import write_json, write_text
from bench.publishing import card, layout
from bench.publishing.layout import CARD, WEIGHTS
from bench.records import attacks, lines, study
from bench.records.copying import copy_record
from bench.records.record import RUNS, Record, find_runs, read_run
from bench.records.study import SUFFIX, Study
from bench.records.verify import check_record
from bench.report import tables

TENSORS = "weights.safetensors"  # compared by the hash in meta.json beside it
RUN_FILES = ("run.json", lines.COMPRESSED)  # of a run, never replaced


@dataclass(frozen=True)
class Gathered:
    """What is to be published: finished runs, and the studies all of whose runs are among them."""

    records: list[Record]
    studies: dict[str, Study]  # name of the file -> its results
    notes: list[str]


def gather(places: Sequence[Path]) -> Gathered:
    """Read and check the runs of folders, run folders and studies.

    Raises BenchError for a run that is unfinished, a shard, imported, or fails a check of ``bench verify``.
    """
    folders, given = list[Path](), set[Path]()
    for place in places:
        if (results := study.find_study(place)) is None:
            folders += find_runs(place) or [place]
            continue
        found, of_study, missing = study.run_folders(results)
        if missing:
            raise BenchError(f"{missing[0]}; finish the study, or give those of its runs that are")
        if changed := study.changed_since(place, found):
            raise BenchError(changed)
        folders += of_study
        given.add(results)
    folders = list({folder.resolve(): folder for folder in folders}.values())
    records = [_checked(folder) for folder in folders]
    names = [record.path.resolve().name for record in records]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BenchError(f"two of the runs are called {twice}; publish them to two places")
    studies, notes = _studies(folders, given)
    for name in [*names, *studies]:
        layout.check_name(name, name)
    return Gathered(records, studies, notes)


def _checked(folder: Path) -> Record:
    record = read_run(folder)
    if record.imported:
        raise BenchError(f"{folder}: an imported log, which is published already; publish runs of bench run")
    if problem := next((f"{f.check}: {f.problem}" for f in check_record(folder) if f.problem), ""):
        raise BenchError(f"{folder}: not published, since a check fails: {problem}; see bench verify {folder}")
    return record


def _studies(folders: Sequence[Path], given: set[Path]) -> tuple[dict[str, Study], list[str]]:
    """Return the studies whose runs are all among the folders, and a line on each that has others too."""
    names = {folder.resolve() for folder in folders}
    whole, notes = dict[str, Study](), list[str]()
    for file in sorted(given | {f for folder in folders for f in folder.resolve().parent.glob(f"*{SUFFIX}")}):
        found, runs, missing = study.run_folders(file)
        published = names & {run.resolve() for run in runs}
        if published and not missing and len(published) == len(runs):
            if file.name in whole and whole[file.name].sha256 != found.sha256:
                raise BenchError(f"two studies are called {found.name}; publish them to two places")
            whole[file.name] = found
        elif published:
            notes.append(f"study {found.name} is left out: {len(published)} of its {len(found.runs)} runs are given")
    return whole, notes


def lay_out(
    gathered: Gathered, weights: Sequence[Path], before: Path | None, out: Path, name: str
) -> tuple[list[str], list[str]]:
    """Write the published folder ``out``: what is there before, and what is added.

    Args:
        gathered: What is published.
        weights: Entries of the cache of trained weights.
        before: The published folder as it is now, if there is one.
        out: An empty folder.
        name: Of the repository or folder, for the card.

    Returns:
        The paths that are new or changed, and a line on what was shortened or replaced.

    Raises:
        BenchError: A run, study or file of weights of the same name is there and differs.
    """
    notes = list(gathered.notes)
    for path in layout.files(before) if before else ():
        assert before is not None
        if not path.endswith(TENSORS):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_bytes(limits.contents(before / path, layout.most(path) or 0))
    (out / RUNS).mkdir(exist_ok=True)
    for record in gathered.records:
        notes += _add_run(record, out)
    for file, found in gathered.studies.items():
        _add_study(file, found, out)
    for entry in weights:
        _add_weights(entry, out)
    records, wrong = tables.load_records(out / RUNS)
    if wrong:
        raise BenchError(f"a run that is published there cannot be shown: {wrong[0]}; publish to another place")
    others = {f.name: study.read_study(f) for f in sorted((out / RUNS).glob(f"*{SUFFIX}"))}
    readme = out / CARD
    text = card.readme(
        name,
        tables.build(records),
        list(others.values()),
        sorted(f.parent.name for f in out.glob(f"{WEIGHTS}/*/meta.json")),
        _text(readme) if readme.exists() else None,
    )
    write_text(readme, text)
    return sorted(_changed(out, before)), notes


def _text(readme: Path) -> str:
    try:
        return readme.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise BenchError(f"README.md there is not UTF-8 text: {e}; convert it") from None


def _add_run(record: Record, out: Path) -> Iterator[str]:
    """Copy a record, unless it is there. Raises BenchError where another run is."""
    name = record.path.resolve().name
    folder, there = out / RUNS / name, out / ".there" / name
    if folder.exists():
        there.parent.mkdir(exist_ok=True)
        folder.rename(there)
    _, changed = copy_record(record, out / RUNS)
    yield from (f"{name}: {line}" for line in changed)
    if not there.exists():
        return
    for file in RUN_FILES:
        if not (there / file).is_file() or _content(there / file) != _content(folder / file):
            raise BenchError(
                f"{name}: another run of this name is published there ({file} differs), and a published run is never "
                "replaced; publish to another place"
            )
        (there / file).replace(folder / file)  # zlib's versions compress to other bytes
    old, new = there / attacks.COMPRESSED, folder / attacks.COMPRESSED
    if old.exists() and (not new.exists() or _content(old) == _content(new)):
        old.replace(new)
    elif old.exists():
        yield f"{name}: {attacks.COMPRESSED} is replaced by that of the run here"
    shutil.rmtree(there.parent)


def _content(file: Path) -> object:
    """Return what a file of a run says, whatever its compression."""
    if file.suffix == limits.GZIP:
        return list(limits.lines(file, attacks.LINE))
    data = limits.contents(file, limits.RUN)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data


def _add_study(name: str, found: Study, out: Path) -> None:
    file, text = out / RUNS / name, out / f"{name.removesuffix(SUFFIX)}.toml"
    if file.exists() and study.read_study(file).sha256 != found.sha256:
        raise BenchError(f"another study called {found.name} is published there; publish to another place")
    if text.exists() and text.read_bytes() != found.text.encode(errors="backslashreplace"):  # as write_text writes it
        raise BenchError(f"another file {text.name} is there; publish to another place")
    write_json(file, found.as_json())
    write_text(text, found.text)


def _add_weights(entry: Path, out: Path) -> None:
    layout.check_name(entry.name, str(entry))
    folder = out / WEIGHTS / entry.name
    if (meta := folder / "meta.json").exists():
        if _sha256(meta) == _sha256(entry / "meta.json"):
            return
        raise BenchError(f"other weights called {entry.name} are published there; publish to another place")
    folder.mkdir(parents=True)
    shutil.copyfile(entry / "meta.json", meta)
    shutil.copyfile(entry / TENSORS, folder / TENSORS)


def _sha256(meta: Path) -> object:
    found = json.loads(limits.contents(meta, layout.LARGEST_META))
    return found.get("sha256") if isinstance(found, dict) else None


def _changed(out: Path, before: Path | None) -> Iterator[str]:
    for path in layout.files(out):
        old = before and before / path
        if old is None or not old.is_file() or old.read_bytes() != (out / path).read_bytes():
            yield path
