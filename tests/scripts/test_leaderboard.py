"""The leaderboard says which records are verified, ranks only what is comparable, and shows no record that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import leaderboard
import pytest

from bench.errors import BenchError
from bench.records.copying import copy_record
from bench.records.record import read_run
from tests.helpers.records import made_up

RADII = [0.3, 0.1, None, 0.6] * 25


def study(reports: Path, *names: str, **changes: Any) -> list[Path]:
    """A study of records of these defenses; the later, the fewer images are right."""
    found = []
    for i, name in enumerate(names):
        run = made_up(reports.parent / "made", RADII, wrong=range(10 * i), name=name, **changes)
        found.append(copy_record(read_run(run), reports / "mine" / "runs")[0])
    return found


def said(run: Path, **changes: Any) -> dict[str, Any]:
    """What bench verify --json says of a run."""
    record = read_run(run)
    about = {"identity": record.identity.sha256, "certificates": record.info.certificates_sha256}
    found = {"verdict": "verified", "why": "", "images_certified_again": 5, "equal_counts": True}
    return {"run": run.name, **about, **found, "certbench": "9.9", "commit": "c" * 40, "source": None, **changes}


def rows(page: str, dataset: str = "digits") -> list[list[str]]:
    """The cells of the rows of a data set's first table."""
    section = page.partition(f"## {dataset}\n")[2].partition("\n## ")[0]
    table = section.partition("#### ")[2].partition("####")[0]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]


def test_each_row_says_by_what_it_is_checked(tmp_path: Path) -> None:
    runs = study(tmp_path / "reports", "best", "good", "poor", "last")
    (tmp_path / "reports" / "mine" / "verified.json").write_text(
        json.dumps(
            [
                said(runs[0]),
                said(runs[1], equal_counts=False, source="hub:a/b", revision="d" * 40),
                said(runs[2], verdict="not verified", why="its weights are *gone*", images_certified_again=0),
                said(runs[3], certificates="0" * 64),  # of another record with this identity
            ]
        )
    )
    found = {row[0]: row for row in rows(leaderboard.page(tmp_path / "reports"))}
    assert list(found) == ["best", "good", "poor", "last"]
    checked = [row[-1] for row in found.values()]
    assert checked[0] == "verified: 5 of 100 images certified again, equal counts, by certbench 9.9 (cccccccccccc)"
    assert checked[1].endswith(f"two-sample test, by certbench 9.9 (cccccccccccc), of hub:a/b@{'d' * 40}")
    assert checked[2] == r"audited by certbench 9.9 (cccccccccccc): its weights are \*gone\*"
    assert checked[3] == "audited: bench verify was not run on it"
    assert found["best"][1:4] == [
        "75.0<br><sub>65.3-83.1</sub>",
        "50.0<br><sub>39.8-60.2</sub>",
        "25.0<br><sub>16.9-34.7</sub>",
    ]
    same = ["probabilistic at alpha", "100", "1,000", "0.001", "vit", "[mine](../mine/report.md)"]
    assert all(row[4:-1] == same for row in found.values())


def test_records_that_are_not_comparable_share_no_table(tmp_path: Path) -> None:
    study(tmp_path / "reports", "one")
    study(tmp_path / "reports", "two", base={"name": "vit", "sha256": "a" * 64})
    study(tmp_path / "reports", "three", sigma=0.5)
    study(tmp_path / "reports", "four", split="validation")
    page = leaderboard.page(tmp_path / "reports")
    assert page.count("#### Certified here: digits, sigma 0.25") == 2
    assert page.count("#### Certified here: digits, sigma 0.5") == 1
    assert "base vit (aaaaaaaa)" in page and "base vit (bbbbbbbb)" in page
    assert "| four" not in page
    assert page == leaderboard.page(tmp_path / "reports")


def test_published_rows_stand_apart_with_how_they_were_checked(tmp_path: Path) -> None:
    study(tmp_path / "reports", "ours", dataset="cifar10")
    page = leaderboard.page(tmp_path / "reports")
    section = page.partition("### CIFAR-10, sigma 0.25\n")[2].partition("\n### ")[0]
    here, _, theirs = section.partition("#### As published")
    assert "| ours |" in here and "| ours |" not in theirs and "arXiv" not in here
    names = [line.split("|")[1].strip() for line in theirs.splitlines() if line.startswith("|")][2:]
    assert names == sorted(names) and len(names) >= 10
    assert "| its own | recomputed from logs |" in theirs and "| its own | read in a README |" in theirs


def test_a_record_that_fails_is_not_shown(tmp_path: Path) -> None:
    (run,) = study(tmp_path / "reports", "one")
    file = tmp_path / "reports" / "mine" / "verified.json"
    file.write_text(json.dumps([said(run, verdict="failed", why="image 3: 5 votes, not 9")]))
    with pytest.raises(BenchError, match="image 3: 5 votes, not 9; a record that fails a check is not shown"):
        leaderboard.page(tmp_path / "reports")
    file.unlink()
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "certificates_sha256": "0" * 64}))
    with pytest.raises(BenchError, match=r"certificates.jsonl was changed"):
        leaderboard.page(tmp_path / "reports")
