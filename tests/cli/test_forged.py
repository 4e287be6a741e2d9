"""bench verify on forged records: each check, asked alone, names what is wrong with the record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records import audit
from bench.records.record import read_run
from bench.records.verify import check_record
from bench.smoothing import bounds
from tests.helpers.commands import Result
from tests.helpers.records import made_up

Bench = Callable[..., Result]
COUNTS = [1000, 900, 700, 400]  # votes of 1,000 for the class
LABEL = {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "label"}


def problems(bench: Bench, run: Path) -> dict[str, str]:
    """What verify finds wrong, by the first word of the check."""
    result = bench("verify", run, "--json")
    assert result.code == 1, result.out + result.err
    (one,) = json.loads(result.out)
    assert one["verdict"] == "failed"
    return {f["check"].split()[0]: f["problem"] for f in one["findings"] if f["problem"]}


def forge(run: Path, **changes: Any) -> Path:
    """Change the first line of a record, and the hash that vouches for it."""
    file = run / "certificates.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    file.write_text(json.dumps(json.loads(first) | changes) + "\n" + "".join(others))
    info = json.loads((run / "run.json").read_text())
    info["certificates_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(info))
    return run


@pytest.mark.parametrize("tau", [0.0, 0.01])
@pytest.mark.parametrize("target", ["selected", "label", "correct"])
def test_a_true_record_has_nothing_wrong_with_it(tmp_path: Path, target: str, tau: float) -> None:
    noise = {"kind": "grid", "version": 1, "tau": tau}
    wrong = [] if target == "label" else [1]
    run = made_up(tmp_path, COUNTS, wrong, counted=True, procedure=LABEL | {"target": target}, noise=noise)
    assert not [f for f in check_record(run) if f.problem]
    assert audit.problem(read_run(run)) == ""


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"n": 999, "top_count": 999, "votes": 1099}, "counts", "1099 votes are not what the procedure draws"),
        ({"votes": 1099}, "counts", "1099 votes are not what the procedure draws"),
        ({"votes": 1101}, "counts", "1101 votes are not what the procedure draws"),
        ({"n0": 99, "votes": 1099}, "counts", "n0 is 99, the procedure's is 100"),
        ({"runner_up": 9}, "counts", "the runner-up and its count disagree"),
        ({"runner_up": 9, "runner_up_count": 1}, "counts", "are not possible"),
        ({"n": 999, "top_count": 999}, "every", "the procedure decides at 1000 votes, not at 999"),
        ({"radius": 0.8}, "every", "is above what p_lower"),
        ({"p_lower": 0.999}, "every", "do not support p_lower 0.999"),
        ({"radius": 0.1}, "every", "the counts give"),
        ({"predicted": None}, "every", "it abstains or predicts against its bound"),
        ({"predicted": 1}, "metrics", "are not those of the certificates"),
        ({"votes": 1101}, "votes", "is not 4401, the sum over images"),
    ],
)
def test_each_check_finds_its_own(
    bench: Bench, tmp_path: Path, changes: dict[str, Any], check: str, words: str
) -> None:
    run = forge(made_up(tmp_path, COUNTS, counted=True), **changes)
    assert words in problems(bench, run)[check]


def test_another_folder_and_a_missing_image_are_found(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, COUNTS, counted=True)
    lines = (run / "certificates.jsonl").read_text().splitlines(keepends=True)
    (run / "certificates.jsonl").write_text("".join(lines[1:]))
    assert problems(bench, run)["every"] == "image 0 is missing"
    (run / "certificates.jsonl").write_text("".join(lines))
    other = run.rename(run.with_name("digits-lora-s0.25-01234567"))
    assert "the identity's hash is" in problems(bench, other)["the"]


def test_an_edited_file_is_not_the_one_that_was_written(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, COUNTS, counted=True)
    with (run / "certificates.jsonl").open("a") as f:
        f.write(" ")  # as read, it is the same
    assert problems(bench, run) == {"the": "certificates.jsonl is not the file that the finished run wrote"}


def test_the_label_is_what_a_label_target_tests(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, COUNTS, wrong=[1], counted=True, procedure=LABEL)
    assert problems(bench, run) == {"every": "image 1: the class tested is not the label"}


@pytest.mark.parametrize("tau", [0.0, 0.01])
@pytest.mark.parametrize("excess", [1e-9, 0.005])
def test_a_bound_that_is_too_large_fails_at_high_precision(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tau: float, excess: float
) -> None:
    """Even where record and recomputation share the error, and the noise's error would hide it."""
    exact = bounds.lower_bound
    monkeypatch.setattr(bounds, "lower_bound", lambda top, n, alpha: exact(top, n, alpha) + excess)
    run = made_up(tmp_path, COUNTS[1:], counted=True, noise={"kind": "grid", "version": 1, "tau": tau})
    (found,) = problems(bench, run).values()
    assert found.startswith("image 0: 900 of 1000 votes do not support p_lower")


def test_a_radius_that_is_rounded_up_fails_at_high_precision(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = bounds.radius
    monkeypatch.setattr(bounds, "radius", lambda p_lower, sigma: exact(p_lower, sigma) * (1 + 1e-9))
    (found,) = problems(bench, made_up(tmp_path, COUNTS, counted=True)).values()
    assert found.startswith("image 0: radius ") and "is above what p_lower" in found


CORRECT = LABEL | {"target": "correct"}
STOPPED = {"n": 0, "top_count": 0, "runner_up": None, "runner_up_count": 0, "p_lower": 0.0, "radius": 0.0}


@pytest.mark.parametrize(
    ("wrong", "procedure", "changes", "check", "words"),
    [
        # The first image is of class 0; where it is wrong, its class is 1 and no votes bound it.
        ([0], CORRECT, {"predicted": 0}, "every", "it has no votes, though its class is not a wrong one"),
        ([0], CORRECT, {"predicted": None}, "every", "it has no votes, though its class is not a wrong one"),
        ([0], CORRECT, {"p_lower": 0.9}, "every", "the counts give 0.0 and 0.0"),
        ([0], CORRECT, {"radius": 0.1}, "every", "the counts give 0.0 and 0.0"),
        ([0], CORRECT, {"top_count": 1}, "counts", "1 and 0 of 0 votes are not possible"),
        ([], CORRECT, {"predicted": 1}, "every", "the class tested is not the label"),
        ([], CORRECT, STOPPED | {"votes": 100, "n0": 100}, "every", "it has no votes, though"),
        ([0], LABEL | {"target": "selected"}, STOPPED | {"votes": 100}, "every", "decides at 1000 votes, not at 0"),
        ([], LABEL, STOPPED | {"votes": 0}, "every", "decides at 1000 votes, not at 0"),
    ],
)
def test_only_a_wrong_class_of_target_correct_has_no_votes(
    bench: Bench,
    tmp_path: Path,
    wrong: list[int],
    procedure: dict[str, Any],
    changes: dict[str, Any],
    check: str,
    words: str,
) -> None:
    run = forge(made_up(tmp_path, COUNTS, wrong, counted=True, procedure=procedure), **changes)
    assert words in problems(bench, run)[check]
    assert "image 0: " in audit.problem(read_run(run))
    assert bench("report", tmp_path).code == 2  # nothing is left to report


@pytest.mark.parametrize("votes", [99, 101, 1100])
def test_a_wrong_class_of_target_correct_has_the_votes_of_its_selection(
    bench: Bench, tmp_path: Path, votes: int
) -> None:
    run = forge(made_up(tmp_path, COUNTS, [0], counted=True, procedure=CORRECT), votes=votes)
    assert problems(bench, run)["counts"] == f"image 0: {votes} votes are not what the procedure draws"
