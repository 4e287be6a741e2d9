"""A record whose certificates do not hold is not reported, compared, exported or shown on the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records import audit
from bench.records.flaws import LogParameters
from bench.records.importing import import_log
from bench.records.record import read_run
from bench.smoothing.anytime import Anytime
from bench.smoothing.procedures import describe
from tests.helpers.commands import Result
from tests.helpers.records import edit, made_up, seal

Bench = Callable[..., Result]
ANYTIME = describe(Anytime(100, 1000, 0.001, (0.25, 0.5)))
FIXED = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "selected"}
LABEL = FIXED | {"target": "label"}


def test_certificates_changed_after_the_run_are_refused_by_every_reader(bench: Bench, tmp_path: Path) -> None:
    good = made_up(tmp_path / "runs", [0.3] * 10, name="good")
    bad = edit(made_up(tmp_path / "runs", [0.3] * 10, name="bad"), seconds=0.25)
    assert audit.problem(read_run(good)) == ""
    for format in ("md", "latex", "csv", "json", "html"):
        result = bench("report", tmp_path / "runs", "--format", format, "--out", tmp_path / format)
        text = (tmp_path / format / "report.html").read_text() if format == "html" else result.out
        assert result.code == 1 and "good" in text
        assert f"left out: {bad}: certificates.jsonl was changed after the run finished" in result.err
        if format == "html":
            assert f"{bad}: certificates.jsonl was changed" in text
        else:
            assert "bad" not in text
    for args in (("compare", good, bad), ("export", bad)):
        refused = bench(*args)
        assert (refused.code, refused.out) == (2, "")
        assert "certificates.jsonl was changed" in refused.err and refused.err.count("\n") == 1
    assert bench("export", good).code == 0


@pytest.mark.parametrize(
    ("procedure", "changes", "words"),
    [
        (FIXED, {"radius": 0.35}, "radius 0.35 are recorded, but "),
        (FIXED, {"radius": 0.9}, "radius 0.9 are recorded"),  # beyond what any votes give
        (FIXED, {"radius": 0.2}, "radius 0.2 are recorded"),
        (FIXED, {"p_lower": 0.99}, "p_lower 0.99 and radius"),
        (FIXED, {"predicted": None}, "the recorded prediction does not follow from"),
        (FIXED, {"top_count": 1001}, "1001 of 1000 votes, but the procedure draws at most 1000"),
        (FIXED, {"top_count": 2**62}, "votes, but the procedure draws at most 1000"),
        (FIXED, {"n": 999}, "decides at 1000 votes, not at 999"),
        (FIXED, {"top_count": 400}, "but 400 of 1000 votes give 0"),
        (LABEL, {"predicted": 7}, "the recorded prediction does not follow from"),
        (ANYTIME, {"radius": 0.5}, "radius 0.5 are recorded"),
        (ANYTIME, {"n": 65, "top_count": 60}, "is not a look of this procedure"),
    ],
)
def test_certificates_that_do_not_follow_from_their_counts(
    bench: Bench, tmp_path: Path, procedure: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    """An edited record can have an edited hash, so the numbers themselves are recomputed."""
    good = made_up(tmp_path / "good", [0.25, 0.25, 0.0], procedure=procedure)
    assert bench("report", tmp_path / "good").code == 0
    bad = seal(edit(good, **changes))
    result = bench("report", tmp_path / "good")
    assert result.code == 2 and "no finished run" in result.err
    assert f"left out: {bad}: image 1: " in result.err and words in result.err
    assert words in bench("export", bad).err


def test_an_imported_log_is_read_though_its_radii_follow_from_no_counts(bench: Bench, tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.123\t1\t1.0\n1\t2\t2\t0.9\t1\t1.0\n")
    run = import_log(log, LogParameters("cohen", "any-data", 0.25, 0.001, 1000), tmp_path / "runs").path
    shown = bench("report", tmp_path / "runs")
    assert shown.code == 0 and "†" in shown.out
    edit(run, radius=0.5)
    assert bench("report", tmp_path / "runs").code == 2
    assert "was changed after the run finished" in bench("export", run).err
