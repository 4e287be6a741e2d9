"""bench import and export: released logs become run folders, and what they get wrong is found and shown."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.records import importing
from bench.records.flaws import LogParameters
from bench.smoothing import bounds
from tests.helpers.commands import TINY, Result
from tests.helpers.logs import HEADER, ROWS, change, radius, text
from tests.helpers.records import made_up

Bench = Callable[..., Result]
SHARED = Path(os.environ.get("CERTBENCH_SHARED") or Path(__file__).parents[3] / "shared")
LOGS = SHARED / "reference" / "logs"
STATED = ("--dataset", "any-data", "--sigma", ".25", "--alpha", ".001", "--n", "1000")


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(path) / "certificates.jsonl").read_text().splitlines()]


def imported(bench: Bench, folder: Path, log: str | bytes, *flags: str, name: str = "log.tsv") -> tuple[Result, Any]:
    """The command's result, and what its --json says."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(log.encode() if isinstance(log, str) else log)
    result = bench("import", file, *(flags or STATED), "--out", folder / "runs", "--json")
    return result, json.loads(result.out) if result.out else {}


def test_a_clean_log_becomes_a_run_that_every_command_takes(bench: Bench, tmp_path: Path) -> None:
    result, info = imported(bench, tmp_path, text(ROWS), *STATED, "--n0", "100")
    assert (result.code, info["flags"], info["status"]) == (0, [], "complete")
    run = Path(info["path"])
    assert run.name.startswith("any-data-log-s0.25-")
    certificates = lines(run)
    assert [c["index"] for c in certificates] == list(range(0, 120, 10))
    assert certificates[0] == {
        **{"index": 0, "label": 0, "predicted": 0, "radius": float(ROWS[0][3]), "n0": None, "n": None},
        **{"top_count": None, "runner_up": None, "runner_up_count": None, "p_lower": None},
        **{"votes": 1100, "seconds": 15.42},
    }
    assert (certificates[-1]["predicted"], certificates[-1]["radius"], certificates[-1]["seconds"]) == (None, 0.0, 15.4)
    assert (info["cost"]["votes"], info["cost"]["train_seconds"]) == (12 * 1100, None)
    assert info["cost"]["certify_seconds"] == pytest.approx(11 * 15.42 + 15.4)
    counted = {p["radius"]: p["count"] for p in info["metrics"]["certified_accuracy"]}
    right = [float(r[3]) for r in ROWS if r[1] == r[2]]
    assert counted == {r: sum(v >= r for v in right) for r in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert info["metrics"]["abstained"]["count"] == 1
    report = bench("report", tmp_path / "runs", "--out", tmp_path / "report", "--columns", "all")
    assert report.code == 0, report.err
    assert "| imported" in report.out and "†" not in report.out.split("|\n\n")[0]
    assert "base not stated" in report.out and "With 12 images" in report.out
    verified = bench("verify", run)
    assert verified.code == 0, verified.out + verified.err
    assert "every image is as the log says" in verified.out and "not drawn again" in verified.out
    assert "12/12" in bench("list", "runs", "--out", tmp_path / "runs").out
    before = (run / "run.json").read_bytes()
    again, _ = imported(bench, tmp_path, text(ROWS), *STATED, "--n0", "100")
    assert again.code == 0 and (run / "run.json").read_bytes() == before


def test_an_import_that_was_interrupted_is_done_again(bench: Bench, tmp_path: Path) -> None:
    _, info = imported(bench, tmp_path, text(ROWS))
    run = Path(info["path"])
    whole = (run / "certificates.jsonl").read_bytes()
    (run / "certificates.jsonl").write_bytes(whole[:-40])
    kept = {k: v for k, v in json.loads((run / "run.json").read_text()).items() if k not in ("cost", "metrics")}
    (run / "run.json").write_text(json.dumps(kept | {"status": "started"}))
    result, info = imported(bench, tmp_path, text(ROWS))
    assert (result.code, info["status"]) == (0, "complete")
    assert (run / "certificates.jsonl").read_bytes() == whole


MANY = [str(i) for i in range(1, 13)]
DEFECTS = {
    "above": (
        change(5, 3, "0.7"),
        "radii above 0.6159, the largest possible at n 1,000 and alpha 0.001: 1 of the rows, image 50 first, the",
    ),
    "rounded": (change(3, 3, f"{math.ceil(radius(950) * 1e4) / 1e4:.6f}"), "no count of votes gives"),
    "nearest": (text([[*r[:3], f"{float(r[3]):.3g}", *r[4:]] for r in ROWS]), "radii rounded up: "),
    "no count": (change(4, 3, f"{(radius(990) + radius(991)) / 2:.6f}"), "no count of votes gives at n 1,000 and"),
    "coarse": (
        text([[*r[:3], "0.25" if i == 2 else f"{float(r[3]):.3g}", *r[4:]] for i, r in enumerate(ROWS)]),
        "rounded to 0.001, which may decide at radius 0.25: 1 of the rows, image 20 first",
    ),
    "running total": (
        text([[*r[:4], str(sum(q[1] == q[2] for q in ROWS[: i + 1])), r[5]] for i, r in enumerate(ROWS)]),
        "column correct is a running total, not 0 or 1",
    ),
    "another total": (text([[*r[:4], MANY[i], r[5]] for i, r in enumerate(ROWS)]), "running total, and not that of"),
    "correct": (change(0, 4, "0"), "correct is wrong: 1 of the rows, image 0 first"),
    "twice": (text([*ROWS, ROWS[3]]), "images twice, the first row kept: 1 of the rows, image 30 first; 0 of them"),
    "contradiction": (text([*ROWS, [*ROWS[3][:3], "0.1", *ROWS[3][4:]]]), "image 30 first; 1 of them say"),
    "missing": (text(ROWS[:4] + ROWS[5:]), "images missing where every 10 of 111 are expected: 1, image 40 first"),
    "abstention": (change(11, 3, "0.1"), "abstentions with a radius, taken as 0: 1 of the rows, image 110 first"),
    "negative": (change(0, 3, "-0.1"), "radius below 0, taken as abstentions: 1 of the rows, image 0 first"),
    "torn": (text(ROWS)[:-8], "lines that are no image's, left out: 1, line 13 first"),
    "not a number": (change(6, 3, "nan"), "no image's, left out: 1, line 8 first"),
    "infinite": (change(6, 3, "inf"), "no image's, left out: 1, line 8 first"),
    "summary": (text(ROWS) + "=== ACR: 0.5 ===\n", "no image's, left out: 1, line 14 first"),
    "unknown column": (text([[*r, "1"] for r in ROWS], HEADER + "\t<b>|x"), "unknown columns, left out: ?b??x"),
    "no time": (text([r[:5] for r in ROWS], HEADER[:-5]), "no column time"),
    "no header": (text(ROWS)[len(HEADER) + 1 :], "no header"),
    "time": (change(0, 5, "soon"), "times that cannot be read: 1 of the rows, image 0 first"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_a_log_are_found_kept_and_shown(bench: Bench, tmp_path: Path, defect: str) -> None:
    log, words = DEFECTS[defect]
    result, info = imported(bench, tmp_path, log)
    assert result.code == 1, result.err
    assert any(words in flag for flag in info["flags"]), info["flags"]
    assert info["status"] == "complete" and len(lines(info["path"])) >= 11
    if defect in ("above", "abstention", "torn"):
        report = bench("report", tmp_path / "runs")
        assert report.code == 0 and "| log † " in report.out
        assert words.split(":")[0] in report.out.replace("\\", "")
        (table,) = json.loads(bench("report", tmp_path / "runs", "--format", "json").out)["tables"]
        assert table["rows"][0]["flags"] == "; ".join(info["flags"])
        verified = bench("verify", info["path"])
        assert verified.code == 1 and verified.out.count("FAIL:") == len(info["flags"])


def test_one_defect_is_one_flag(bench: Bench, tmp_path: Path) -> None:
    """A defect of one row is not reported for others: all but two of the logs have a single flag."""
    for defect, (log, _) in DEFECTS.items():
        if defect not in ("coarse", "nearest", "torn", "not a number", "infinite"):
            _, info = imported(bench, tmp_path / defect.replace(" ", "-"), log)
            assert len(info["flags"]) == 1, (defect, info["flags"])


def test_a_log_that_ends_early_is_reported_where_the_size_is_known(bench: Bench, tmp_path: Path) -> None:
    rows = [[str(20 * i), *ROWS[0][1:]] for i in range(427)]
    _, info = imported(bench, tmp_path, text(rows), *("--dataset", "cifar10"), *STATED[2:])
    assert info["flags"] == ["images missing where every 20 of 10,000 are expected: 73, image 8540 first"]
    _, info = imported(bench, tmp_path, text(rows))
    assert info["flags"] == []
    rows[3][1] = rows[3][2] = "10"
    _, info = imported(bench, tmp_path, text(rows), *("--dataset", "cifar10"), *STATED[2:])
    assert "classes from 10 on, of which the data set has 10: 1 of the rows, image 60 first" in info["flags"]


@pytest.mark.parametrize(
    ("log", "flags", "words"),
    [
        ("", STATED, "it is empty"),
        ("\0\xff\n", STATED, "none of its lines|no column"),
        (b"\xff\xfe\x00", STATED, "not a text file"),
        ("a\tb\n1\t2\n", STATED, "no column idx, label, predict, radius"),
        (text([]), STATED, "none of its lines is an image's"),
        (text(ROWS, HEADER + "\ttime"), STATED, "column time is there twice"),
        (text(ROWS), (*STATED, "--format", "chen"), "unknown format 'chen'"),
        (text(ROWS), (*STATED, "--radius", "1"), "only of adaptive logs"),
        (text(ROWS), (*STATED, "--format", "adaptive", "--radius", ".5"), "leave --radius out"),
        (text(ROWS, HEADER.replace("radius", "radius proved")), STATED, "--format adaptive"),
        (text(ROWS, HEADER.replace("radius", "radius proved")), (*STATED, "--format", "adaptive"), "with --radius"),
        (text(ROWS), ("--dataset", "../up", *STATED[2:]), "a name has letters"),
        (text(ROWS), ("--dataset", "no.toml", *STATED[2:]), "no data set card"),
        (text(ROWS), (*STATED, "--n", "5"), "n must be 10 to"),
        (text(ROWS), (*STATED, "--sigma", "0"), "--sigma 0"),
        (text(ROWS), (*STATED, "--alpha", "1"), "--alpha 1"),
        (text(ROWS), (*STATED, "--n0", "0"), "--n0 0"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    bench: Bench, tmp_path: Path, log: str | bytes, flags: tuple[str, ...], words: str
) -> None:
    result, _ = imported(bench, tmp_path, log, *flags)
    assert (result.code, result.out) == (2, "")
    assert any(w in result.err for w in words.split("|")) and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "runs").exists()


def test_files_that_are_absent_or_too_large(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, words in ((tmp_path / "no.tsv", "cannot read"), (tmp_path, "not a regular file")):
        result = bench("import", path, *STATED, "--out", tmp_path / "runs")
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1
    monkeypatch.setattr(importing, "LARGEST", 100)
    result, _ = imported(bench, tmp_path, text(ROWS))
    assert result.code == 2 and "more than a log of a million images" in result.err


HORVATH = "idx\tlabel\tpredict\tradius proved\tcorrect\tlevels_needed\testimated_pr\tsamples_needed\ttime"


def test_an_adaptive_log_that_states_only_proved_or_not(bench: Bench, tmp_path: Path) -> None:
    """As smoothing-ensembles writes them (arXiv 2106.06946): 1 or -1 in place of a radius."""
    rows = [
        *(
            ["0", "3", "3", "1", "1", "0", "0.998", "1100", "0:00:01"],
            ["20", "4", "7", "1", "0", "1", "0.99", "11200", "1"],
        ),
        *(["40", "5", "-1", "-1", "0", "0", "0.4", "1100", "1"], ["60", "6", "6", "1", "1", "1", "0.9", "11200", "1"]),
    ]
    adaptive = ("--dataset", "cifar10", "--sigma", ".25", "--alpha", ".001", "--n", "10000", "--format", "adaptive")
    result, info = imported(bench, tmp_path, text(rows, HORVATH), *adaptive, "--radius", ".25")
    assert (result.code, info["flags"], info["radii"]) == (0, [], [0.25])
    assert [(c["predicted"], c["radius"], c["votes"]) for c in lines(info["path"])] == [
        *((3, 0.25, 1100), (7, 0.25, 11200), (None, 0.0, 1100), (6, 0.25, 11200)),
    ]
    assert info["metrics"]["certified_accuracy"][0]["count"] == 2
    assert info["cost"]["votes"] == 24600
    assert bench("verify", info["path"]).code == 0
    report = bench("report", tmp_path / "runs", "--out", tmp_path / "report.md")
    assert report.code == 0 and "adaptive up to 10,000 votes" in report.out
    # .5 = 2 sigma needs p = .977: a share of .9 cannot have proved it. Nor can any share 5 sigma.
    result, info = imported(bench, tmp_path, text(rows, HORVATH), *adaptive, "--radius", ".5")
    assert result.code == 1
    assert info["flags"] == ["radii above what estimated_pr supports: 1 of the rows, image 60 first"]
    _, info = imported(bench, tmp_path, text(rows, HORVATH), *adaptive, "--radius", "1.25")
    assert info["flags"][0].startswith(
        "radii above 0.7997, the largest possible at n 10,000 and alpha 0.001: 3 of the rows"
    )


def test_an_adaptive_log_with_radii(bench: Bench, tmp_path: Path) -> None:
    """As Chen et al. write them, with their summary below."""
    header = "idx\tlabel\tpredict\tpA\tsamplesize\tradius\tcorrect\ttime_forward"
    rows = [["0", "3", "3", "0.990", "400", "0.582", "1", "0.1"], ["1", "8", "-1", "0.400", "0", "0", "0", "0.1"]]
    flags = (*STATED, "--format", "adaptive")
    result, info = imported(bench, tmp_path, text(rows, header) + "===Summary===\nACR: 0.29\n", *flags)
    assert result.code == 1
    assert info["flags"] == ["lines that are no image's, left out: 2, line 4 first"]
    assert [(c["radius"], c["votes"], c["seconds"]) for c in lines(info["path"])] == [(0.582, 400, 0.1), (0.0, 0, 0.1)]
    assert info["radii"] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_radius_column_of_one_and_minus_one_is_no_radius(bench: Bench, tmp_path: Path) -> None:
    rows = [["0", "3", "3", "1", "1", "1"], ["20", "4", "-1", "-1", "0", "1"]]
    result, _ = imported(bench, tmp_path, text(rows), *STATED, "--format", "adaptive")
    assert result.code == 2 and "--radius" in result.err


@given(counts=st.lists(st.integers(560, 1000), min_size=1, max_size=30), data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_run_that_is_exported_and_imported_is_the_same(counts: list[int], data: st.DataObject) -> None:
    from bench.records.logs import export_log
    from bench.records.record import read_run

    abstain = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    wrong = data.draw(st.sets(st.integers(0, len(counts) - 1)))
    radii = [
        None if a else bounds.radius(bounds.lower_bound(c, 1000, 0.001), 0.25)
        for c, a in zip(counts, abstain, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        record = read_run(made_up(Path(folder), radii, wrong=sorted(wrong)))
        log = Path(folder) / "log.tsv"
        log.write_text(export_log(record))
        again = importing.import_log(
            log, LogParameters("cohen", "digits", 0.25, 0.001, 1000, 100), Path(folder) / "runs"
        )
    assert again.flags == []
    shown = ("index", "label", "predicted", "radius", "votes", "seconds")
    assert [[getattr(c, k) for k in shown] for c in again.certificates] == [
        [getattr(c, k) for k in shown] for c in record.certificates
    ]
    assert again.info.metrics and record.info.metrics
    assert {k: again.info.metrics[k] for k in ("certified_accuracy", "acr", "abstained")} == {
        k: record.info.metrics[k] for k in ("certified_accuracy", "acr", "abstained")
    }


@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
def test_a_real_run_exports_imports_and_compares(bench: Bench, tmp_path: Path, procedure: str) -> None:
    ran = bench(
        *("run", "--defense", "none", "--dataset", TINY, "--noise", "float", "--procedure", procedure),
        *("--out", tmp_path / "own", "--n", "600", "--json"),
    )
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    log = tmp_path / "log.tsv"
    assert bench("export", info["path"], "--out", log).code == 0
    printed = bench("export", info["path"])
    assert printed.out == log.read_text() and printed.out.startswith(HEADER + "\t")
    stated = ("--dataset", TINY, "--sigma", ".25", "--alpha", ".001", "--n", "600", "--n0", "20")
    kind = "cohen" if procedure == "fixed" else "adaptive"
    result = bench("import", log, *stated, "--format", kind, "--out", tmp_path / "runs", "--json")
    assert result.code == 0, result.out + result.err
    claims = lines(json.loads(result.out)["path"])
    own = sorted(lines(info["path"]), key=lambda c: c["index"])
    for key in ("index", "label", "predicted", "radius", "seconds"):
        assert [c[key] for c in claims] == [c[key] for c in own]
    assert bench("export", json.loads(result.out)["path"]).out == printed.out
    compared = bench("compare", info["path"], json.loads(result.out)["path"], "--json")
    if procedure == "anytime":
        assert compared.code == 3 and "procedure.kind is anytime and adaptive" in compared.err
        return
    assert compared.code == 0, compared.err
    found = json.loads(compared.out)
    assert found["unknown"] == ["images"]
    assert {r["p"] for r in found["pairs"][0]["radii"]} == {1.0}
    assert found["pairs"][0]["first_ahead"] == found["pairs"][0]["second_ahead"] == []


def identity_of_certificates(path: str | Path) -> dict[str, Any]:
    """The part of a run's identity that decides how many votes each certificate had, and under which noise."""
    identity = json.loads((Path(path) / "run.json").read_text())["identity"]
    kept = {k: identity["procedure"].get(k) for k in ("n", "n0", "alpha", "target")}
    return kept | {"sigma": identity["sigma"], "noise": identity["noise"]["kind"], "split": identity["split"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": {"kind": "float", "version": 1, "tau": 0.0}},
        {"split": "validation"},
        {"procedure": {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "label"}},
        {"sigma": 0.5, "procedure": {"kind": "fixed", "n0": 7, "n": 500, "alpha": 0.01, "target": "selected"}},
    ],
)
def test_an_export_states_what_its_import_needs(bench: Bench, tmp_path: Path, changes: dict[str, Any]) -> None:
    wrong = [] if changes.get("procedure", {}).get("target") == "label" else [1]
    run, log = made_up(tmp_path / "own", [0.1, 0.2, None, 0.3], wrong, **changes), tmp_path / "log.tsv"
    assert bench("export", run, "--out", log).code == 0
    result = bench("import", log, "--dataset", "digits", "--out", tmp_path / "runs", "--json")
    assert result.code == 0, result.out + result.err
    again = json.loads(result.out)
    assert again["flags"] == []
    assert identity_of_certificates(again["path"]) == identity_of_certificates(run)
    assert [c["votes"] for c in lines(again["path"])] == [c["votes"] for c in lines(run)]
    assert bench("export", again["path"]).out == log.read_text()
    assert bench("verify", again["path"]).code == 0
    compared = bench("compare", run, again["path"], "--json")
    assert compared.code == 0, compared.err
    # A reader that takes columns by name reads what it read before.
    frame = pd.read_csv(log, delimiter="\t")
    assert list(frame["predict"]) == [c["predicted"] if c["predicted"] is not None else -1 for c in lines(run)]


def test_an_anytime_export_keeps_the_votes_of_each_image(bench: Bench, tmp_path: Path) -> None:
    args = ("run", "--defense", "none", "--dataset", TINY, "--procedure", "anytime", "--n", 600, "--json")
    ran = bench(*args, "--out", tmp_path / "own")
    (info,) = json.loads(ran.out)
    assert bench("export", info["path"], "--out", tmp_path / "log.tsv").code == 0
    result = bench("import", tmp_path / "log.tsv", "--dataset", TINY, "--out", tmp_path / "runs", "--json")
    assert result.code == 0, result.out + result.err
    again = json.loads(result.out)
    assert again["identity"]["procedure"]["kind"] == "adaptive" and again["identity"]["noise"]["kind"] == "grid"
    own = sorted(lines(info["path"]), key=lambda c: c["index"])
    assert [c["votes"] for c in lines(again["path"])] == [c["votes"] for c in own]


def test_what_a_log_states_and_what_is_given_are_compared(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text(
        text([[*r, "0.25", "0.001", "1000", "grid"] for r in ROWS], f"{HEADER}\tsigma\talpha\tn\tnoise")
    )
    args = ("import", tmp_path / "log.tsv", "--dataset", "any-data", "--out", tmp_path / "runs", "--json")
    assert json.loads(bench(*args).out)["identity"]["noise"]["kind"] == "grid"
    other = bench(*args, "--noise", "float")
    assert other.code == 1
    assert json.loads(other.out)["flags"] == ["its column noise says grid; float was given"]
    assert bench("verify", json.loads(other.out)["path"]).code == 1  # of the flag alone
    assert bench(*args, "--noise", "pink").code == 2


def test_columns_of_others_that_are_named_alike_are_left_out(bench: Bench, tmp_path: Path) -> None:
    rows = [[*r, str(i), "wide"] for i, r in enumerate(ROWS)]
    result, info = imported(bench, tmp_path, text(rows, f"{HEADER}\tn\tnoise"))
    assert result.code == 1
    assert info["flags"] == ["unknown columns, left out: n, noise"]
    assert info["identity"]["procedure"]["n"] == 1000 and info["identity"]["noise"]["kind"] == "float"


@pytest.mark.parametrize("value", ["-5", "nan", "1e400", "9" * 5000, "0", "inf", "x", "2e-1"])
@pytest.mark.parametrize("column", ["n0", "sigma", "alpha", "format"])
def test_what_no_certificate_can_have_been_made_with_is_no_statement(
    bench: Bench, tmp_path: Path, column: str, value: str
) -> None:
    result, info = imported(bench, tmp_path, text([[*r, value] for r in ROWS], f"{HEADER}\t{column}"))
    assert result.code == 1
    if value == "2e-1" and column in ("sigma", "alpha"):
        assert info["flags"][0].startswith(f"its column {column} says 0.2; ")
    else:
        assert info["flags"] == [f"unknown columns, left out: {column}"]


def test_a_log_that_does_not_state_them_needs_sigma_alpha_and_n(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text(text(ROWS))
    refused = bench("import", tmp_path / "log.tsv", "--dataset", "any-data", "--sigma", ".25", "--out", tmp_path)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "does not state alpha, n: give --alpha --n" in refused.err
    noise = bench("import", tmp_path / "log.tsv", *STATED, "--noise", "grid", "--out", tmp_path, "--json")
    assert json.loads(noise.out)["identity"]["noise"]["kind"] == "grid"


def test_imports_compare_and_their_flags_are_shown(bench: Bench, tmp_path: Path) -> None:
    _, one = imported(bench, tmp_path, text(ROWS), name="one.tsv")
    _, two = imported(bench, tmp_path, DEFECTS["above"][0], name="a|<i>two.tsv")
    result = bench("compare", one["path"], two["path"])
    assert result.code == 0, result.err
    assert "Not stated by an imported run, so not compared: images, procedure.n0." in result.out
    assert "Run 2 is imported with a flag: radii above" in result.out
    assert "<i>" not in result.out + bench("report", tmp_path / "runs").out
    grid = made_up(tmp_path / "own", [0.1] * 12, indices=[c["index"] for c in lines(one["path"])])
    refused = bench("compare", one["path"], grid)
    assert refused.code == 3 and "noise is float and grid" in refused.err


def test_an_unfinished_run_is_not_exported(bench: Bench, tmp_path: Path) -> None:
    run = made_up(tmp_path, [0.1])
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"status": "started"}))
    result = bench("export", run)
    assert (result.code, result.out) == (2, "") and "unfinished" in result.err
    (run / "run.json").write_text(json.dumps(info))
    result = bench("export", run, "--out", tmp_path / "no" / "log.tsv")
    assert result.code == 2 and "--out" in result.err


@pytest.mark.parametrize("what", ["claim", "source", "flags", "stated"])
def test_verify_catches_a_changed_import(bench: Bench, tmp_path: Path, what: str) -> None:
    _, info = imported(bench, tmp_path, DEFECTS["abstention"][0])
    copy = Path(shutil.copytree(info["path"], tmp_path / Path(info["path"]).name))
    kept = json.loads((copy / "run.json").read_text())
    if what == "claim":
        old = (copy / "certificates.jsonl").read_text()
        (copy / "certificates.jsonl").write_text(old.replace('"predicted": 7', '"predicted": 1'))
    elif what == "source":
        (copy / "source.tsv").write_text(text(ROWS))
    elif what == "flags":
        (copy / "run.json").write_text(json.dumps(kept | {"flags": []}))
    else:
        kept["identity"]["procedure"]["n"] = 100000
        (copy / "run.json").write_text(json.dumps(kept))
    before, after = bench("verify", info["path"]), bench("verify", copy)
    assert (before.code, after.code) == (1, 1)
    assert after.out.count("FAIL:") > before.out.count("FAIL:") == 1


def test_an_import_without_its_log_cannot_be_verified(bench: Bench, tmp_path: Path) -> None:
    _, info = imported(bench, tmp_path, text(ROWS))
    (Path(info["path"]) / "source.tsv").unlink()
    result = bench("verify", info["path"])
    assert result.code == 2 and "source.tsv" in result.err and result.err.count("\n") == 1


@pytest.fixture(params=["cifar10-resnet110-sigma0.25", "imagenet-resnet50-sigma0.50"])
def real(request: pytest.FixtureRequest) -> Path:
    file = LOGS / f"cohen-{request.param}.tsv"
    if not file.is_file():
        pytest.skip(f"no released logs at {LOGS}; CERTBENCH_SHARED says where shared/ is")
    return file


def test_released_logs(bench: Bench, tmp_path: Path, real: Path) -> None:
    """Cohen et al.'s: beyond what alpha .001 allows, while at alpha .01 every radius follows from a count."""
    _, dataset, _, sigma = real.stem.split("-")
    s = float(sigma.removeprefix("sigma"))
    stated = ("--dataset", dataset, "--sigma", s, "--n", 100000, "--out", tmp_path, "--json")
    result = bench("import", real, *stated, "--alpha", 0.001)
    info = json.loads(result.out)
    assert result.code == 1
    table = [line.split("\t") for line in real.read_text().splitlines()[1:]]
    assert info["metrics"]["images"] == len(table) == 500
    for point in info["metrics"]["certified_accuracy"]:
        held = sum(row[4] == "1" and float(row[3]) >= point["radius"] for row in table)
        assert point["count"] == held
    with mpmath.workdps(30):
        z = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf("0.001") ** (mpmath.mpf(1) / 100000) - 1)
        above = [r for r in table if r[2] != "-1" and float(r[3]) - (0.0005 if float(r[3]) < 1 else 0.005) > s * z]
    assert len(above) > 70
    assert info["flags"][0].startswith(f"radii above {math.ceil(10**4 * s * z) / 10**4:.4f}, the largest possible")
    assert f": {len(above)} of the rows" in info["flags"][0]
    flags = json.loads(bench("import", real, *stated, "--alpha", 0.01).out)["flags"]
    assert all("above" not in f and "no count" not in f for f in flags) and "rounded up" in flags[0]
    verified = bench("verify", info["path"])
    assert verified.code == 1 and "FAIL: the log is without known defects" in verified.out
