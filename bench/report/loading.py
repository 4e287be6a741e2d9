"""Find the runs of a folder, of one run, or of a study, as a report takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.records import study
from bench.records.record import Record
from bench.records.study import Study
from bench.report import tables


@dataclass(frozen=True)
class Found:
    """Finished runs whose certificates hold, a line for each run left out, and the study they are of."""

    records: list[Record]
    left_out: list[str]
    study: Study | None = None


def find(place: Path) -> Found:
    """Load the runs of a folder, of a run folder, or of a study by its file or folder. Raises BenchError."""
    results = study.find_study(place)
    if results is None:
        return Found(*tables.load_records(place))
    of_study, folders, missing = study.run_folders(results)
    records, left_out = tables.load(folders)
    return Found(records, [*filter(None, [study.changed_since(place, of_study)]), *missing, *left_out], of_study)
