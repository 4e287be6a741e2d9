"""The audit of every reader: certificates that do not follow from their counts are named."""

from __future__ import annotations

import json
from pathlib import Path

from bench.records import audit
from bench.records.record import read_run
from tests.helpers.records import edit, made_up, seal


def test_an_abstention_with_a_class_is_refused(tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.3, None])
    assert audit.problem(read_run(run)) == ""
    assert "prediction does not follow" in audit.problem(read_run(seal(edit(run, predicted=1))))


def test_a_last_bit_of_another_scipy_is_no_edit(tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.3, 0.2])
    radius = read_run(run).counted[1].radius
    assert audit.problem(read_run(seal(edit(run, radius=radius * (1 + 1e-13))))) == ""
    assert audit.problem(read_run(seal(edit(run, radius=radius * (1 + 1e-6)))))


def test_without_a_hash_the_counts_still_decide(tmp_path: Path) -> None:
    """Schema 1 had no hash of the certificates."""
    run = made_up(tmp_path, [0.3, 0.2])
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"certificates_sha256": None}))
    assert audit.problem(read_run(run)) == ""
    assert "image 1" in audit.problem(read_run(edit(run, radius=0.6)))
