"""bench report of none, one, many, broken and old runs, in every format; golden tables; a million certificates."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.report import tables, terminal
from tests.helpers.commands import Result
from tests.helpers.records import RADII, begun, certificate, fewest, made_up, seal

Bench = Callable[..., Result]
FORMATS = ("md", "latex", "csv", "json", "html")
HERE = Path(__file__).parent


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    info = json.loads((run / "run.json").read_text())
    change(info)
    (run / "run.json").write_text(json.dumps(info))
    return run


def rows(text: str, format: str) -> int:
    """Count the lines of the report's tables, without headings."""
    if format == "csv":
        return len(list(csv.DictReader(io.StringIO(text))))
    if format == "json":
        return sum(len(t["rows"]) for t in json.loads(text)["tables"])
    if format == "html":  # a row a method in the default columns, and again in all columns
        return text.count('<tr><th scope="row">') // 2
    if format == "latex":
        return len(re.findall(r"^[^%\n]+&[^\n]+\\\\$", text, re.M)) - text.count(r"\toprule")
    return len(re.findall(r"^\|", text, re.M)) - 2 * len(re.findall(r"^\|:?-", text, re.M))


def written(bench: Bench, runs: Path, out: Path, format: str) -> tuple[Result, str]:
    """Run the report, and return what is printed or, for html, written."""
    if format != "html":
        result = bench("report", runs, "--format", format)
        return result, result.out
    result = bench("report", runs, "--format", format, "--out", out)
    return result, (out / "report.html").read_text() if out.exists() else ""


@pytest.mark.parametrize("format", FORMATS)
def test_no_run_is_exit_2_and_one_run_is_a_report(bench: Bench, tmp_path: Path, format: str) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path / "runs", tmp_path / "absent"):
        result, text = written(bench, folder, tmp_path / "out", format)
        assert (result.code, result.out, text) == (2, "", "")
        assert "no finished run" in result.err and result.err.count("\n") == 1
    made_up(tmp_path / "runs", [0.3] * 6 + [0.1] * 3 + [None])
    result, text = written(bench, tmp_path / "runs", tmp_path / "out", format)
    assert result.code == 0, result.err
    assert rows(text, format) == 1
    assert "60.0" in text or '"certified_0.25":0.6' in text.replace(" ", "") or ",0.6," in text


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 runs: 100 methods, two seeds each, at two sigmas."""
    out = tmp_path_factory.mktemp("many")
    for i in range(50):
        for seed in (0, 1):
            for sigma in (0.25, 0.5):
                radii = [0.3] * (i + seed) + [0.1] * (50 - i - seed)
                made_up(out, radii, name=f"m{i}", seed=seed, sigma=sigma, train_sigma=sigma)
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_two_hundred_runs_are_reported_quickly(bench: Bench, many: Path, tmp_path: Path, format: str) -> None:
    assert len(list(many.iterdir())) == 200
    began = time.process_time()
    result, text = written(bench, many, tmp_path, format)
    spent = time.process_time() - began
    assert result.code == 0, result.err
    assert rows(text, format) == (200 if format in ("csv", "json") else 100)
    assert spent < 30  # seconds of a processor, several times what it takes: no square of the number of runs


def test_a_figure_of_many_rows_shows_only_the_first_and_states_it(many: Path, tmp_path: Path) -> None:
    from bench.report.figures import MOST, curves

    records, _ = tables.load_records(many)
    svg = curves(tables.build(records).tables[0], tmp_path, "figure")[0].read_text()
    text = " ".join(re.findall(r"<!-- (.*?) -->", svg))  # matplotlib draws text as paths, with the text in comments
    assert f"the first {MOST} of the table's 50 rows" in text
    assert len(re.findall(r"<!-- m\d+ -->", svg)) == MOST


def test_unfinished_and_corrupt_runs_are_listed_and_left_out(bench: Bench, tmp_path: Path) -> None:
    good = made_up(tmp_path / "runs", [0.3] * 10, name="good")
    spoilt = {}
    for name, change in {
        "begun": lambda info: info.update(status="started"),
        "nocost": lambda info: info.pop("cost"),
        "noradii": lambda info: info.pop("radii"),
        "words": lambda info: info.update(radii="many"),
        "noindices": lambda info: info["identity"].pop("indices"),
        "nosigma": lambda info: info["identity"].update(sigma=None),
        "newer": lambda info: info.update(schema=99),
    }.items():
        spoilt[name] = edit(made_up(tmp_path / "runs", [0.3] * 10, name=name), change)
    for name in ("lost", "short", "torn", "bytes"):
        spoilt[name] = made_up(tmp_path / "runs", [0.3] * 10, name=name)
    (spoilt["lost"] / "certificates.jsonl").unlink()
    file = spoilt["short"] / "certificates.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    file = spoilt["torn"] / "certificates.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    (spoilt["bytes"] / "certificates.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "runs" / "json").mkdir()
    (tmp_path / "runs" / "json" / "run.json").write_text("{")
    for format in FORMATS:
        result, text = written(bench, tmp_path / "runs", tmp_path / format, format)
        assert result.code == 1
        assert rows(text, format) == 1 and "good" in text
        lines = result.err.splitlines()
        for path in [*spoilt.values(), tmp_path / "runs" / "json"]:
            assert [line for line in lines if line.startswith("bench: left out: ") and str(path) in line], path
        assert not [line for line in lines if str(good) in line and "left out" in line]
    assert "unfinished (10 of 10 images)" in result.err
    compared = bench("compare", good, spoilt["short"])
    assert compared.code == 2 and "corrupt" in compared.err and compared.err.count("\n") == 1


def test_runs_of_older_schemas_share_a_table_with_new_ones(bench: Bench, tmp_path: Path) -> None:
    """Schema 2 had one word for family and trains; 1 no settings, nothing trained elsewhere, no certificates' hash."""

    def old(info: dict[str, Any]) -> None:
        info["schema"] = 2
        info["defense"]["family"] = info["defense"].pop("trains")

    def older(info: dict[str, Any]) -> None:
        old(info)
        info["schema"] = 1
        del info["certificates_sha256"]
        for key in ("settings", "search", "trained_elsewhere"):
            del info["defense"][key]
        for key in ("trained_here", "trained_elsewhere"):
            info["cost"].pop(key)
        info["cost"]["trainable_nominal"] = 77

    made_up(tmp_path / "runs", [0.3] * 20 + [0.1] * 20, name="today")
    edit(made_up(tmp_path / "runs", [0.3] * 30 + [0.1] * 10, name="old"), old)
    edit(made_up(tmp_path / "runs", [0.3] * 10 + [0.1] * 30, name="older"), older)
    for format in FORMATS:
        result, text = written(bench, tmp_path / "runs", tmp_path / format, format)
        assert result.code == 0, result.err
        assert rows(text, format) == 3
    (table,) = json.loads(bench("report", tmp_path / "runs", "--format", "json").out)["tables"]
    assert {r["defense"]: (r["trained_here"], r["certified_0.25"]) for r in table["rows"]} == {
        "today": (100, 0.5),
        "old": (100, 0.75),
        "older": (77, 0.25),
    }


def golden_runs(out: Path) -> None:
    made_up(out, [0.3] * 30 + [0.1] * 8 + [None] * 2, name="full")
    for seed in (0, 1, 2):
        radii = [0.5] * 5 + [0.3] * (18 + seed) + [0.1] * (17 - seed)
        cost = {"train_seconds": 3.0 + seed, "trained_here": 12_345}
        made_up(out, radii, wrong=[39], name="lora_&_co", seed=seed, cost=cost)
    made_up(out, [0.1] * 20 + [None] * 20, name="none", cost={"train_seconds": 0.0, "flops_per_vote": None})


@pytest.mark.parametrize(
    ("flags", "file"),
    [
        (["--format", "md"], "report.md"),
        (["--columns", "all"], "report-all.md"),
        (["--format", "latex"], "report.tex"),
    ],
)
def test_tables_match_the_golden_files(bench: Bench, tmp_path: Path, flags: list[str], file: str) -> None:
    """The numbers in tests/cli/golden were counted by hand (below)."""
    golden_runs(tmp_path)
    assert bench("report", tmp_path, *flags).out == (HERE / "golden" / file).read_text()


def test_the_golden_table_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    golden_runs(tmp_path)
    text = terminal.render(tables.build(tables.load_records(tmp_path)[0]))
    assert text == (HERE / "golden" / "report.txt").read_text()


def test_the_golden_default_columns_have_the_numbers_of_all_columns() -> None:
    """Value, interval and costs of each row, whichever columns hold them."""
    every, few = (
        {c[1]: c[2:-1] for line in lines for c in [[x.strip() for x in line.split("|")]] if len(c) > 1}
        for lines in ((HERE / "golden" / f).read_text().splitlines() for f in ("report-all.md", "report.md"))
    )
    assert few["defense"] == [
        *("r = 0", "r = 0.25", "r = 0.5", "base, clean"),
        *("trained here<br>GFLOPs/vote", "train (s)<br>certify (s)"),
    ]
    for name in ("full", "lora_&_co (3 seeds)", "none"):
        all_of = dict(zip(every["defense"], every[name], strict=True))
        words = " ".join(few[name]).replace("<br><sub>", " ").replace("</sub>", "")
        accuracies = [all_of[c] for c in every["defense"][:3]]
        expected = [re.sub(r"^(\S+) \[([\d.]+)%, ([\d.]+)%\](.*)", r"\1\4 \2-\3", a) for a in accuracies]
        costs = ("base, clean", "trained here", "GFLOPs / vote", "train (s)", "certify (s)")
        assert words == " ".join([*expected, *(all_of[c] for c in costs)])


def test_the_golden_numbers_are_those_of_the_records() -> None:
    lines = (HERE / "golden" / "report-all.md").read_text().splitlines()
    cells = {c[1]: c[2:] for line in lines if line.startswith("|") for c in [[x.strip() for x in line.split("|")]]}
    assert [c.split("%")[0] for c in cells["full"][:3]] == ["95.0", "75.0", "0.0"]  # 38, 30 and 0 of 40
    # 39 of 40 in each seed; 23, 24 and 25; 5 in each.
    assert [c.split("%")[0] for c in cells["lora_&_co (3 seeds)"][:3]] == ["97.5", "60.0", "12.5"]
    assert [c.split("%")[0] for c in cells["none"][:3]] == ["50.0", "0.0", "0.0"]
    head = cells["defense"]
    cells_of = {name: dict(zip(head, cells[name], strict=True)) for name in ("full", "lora_&_co (3 seeds)", "none")}
    assert [c["abstained"] for c in cells_of.values()] == ["5.0%", "0.0%", "50.0%"]
    assert [c["train (s)"] for c in cells_of.values()] == ["10.0", "4.0", "0.0"]
    assert [c["trained here"] for c in cells_of.values()] == ["100", "12,345", "100"]
    assert [c["GFLOPs / vote"] for c in cells_of.values()] == ["0.001", "0.001", "—"]
    assert [c["votes"] for c in cells_of.values()] == ["44,000"] * 3
    # Radii over all images, of lora those of the middle seed.
    identity = begun(40).identity
    low, middle, high = (certificate(identity, 0, 0, fewest(identity, r)).radius for r in (0.1, 0.3, 0.5))
    sums = [30 * middle + 8 * low, 5 * high + 19 * middle + 15 * low, 20 * low]
    assert [c["ACR"] for c in cells_of.values()] == [f"{total / 40:.3f}" for total in sums]
    assert RADII == [0.0, 0.25, 0.5, 0.75]


def test_a_change_of_a_record_changes_its_cell_alone(tmp_path: Path) -> None:
    """Each cost in a table comes from its record, so another cost changes one cell."""
    golden_runs(tmp_path)
    records, _ = tables.load_records(tmp_path)
    before = tables.build(records).tables[0].cells
    for key, title in {
        "train_seconds": "train (s)",
        "certify_seconds": "certify (s)",
        "votes": "votes",
        "flops_per_vote": "GFLOPs / vote",
        "trained_here": "trained here",
        "trained_elsewhere": "trained elsewhere",
        "parameters": "parameters",
        "peak_memory": "peak memory (MB)",
    }.items():
        (record,) = (r for r in records if r.identity.defense.name == "full")
        other = replace(record, info=record.info.replace(cost=record.cost.replace(**{key: 75 * 10**8})))
        after = tables.build([other if r is record else r for r in records]).tables[0].cells
        changed = [(row, c) for row in range(len(after)) for c in after if after[c][row] != before[c][row]]
        assert changed == [(list(before["defense"]).index("full"), title)]


# What each does in a process of its own, with the most memory it held, in bytes.
SCRIPT = """
import resource, sys
from bench.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024), file=sys.stderr)
"""


def million(out: Path, name: str, images: int) -> Path:
    """Make a finished run of many images."""
    run = made_up(out, range(501, 1001), name=name, counted=True)
    lines = [json.loads(line) for line in (run / "certificates.jsonl").read_text().splitlines()]
    with (run / "certificates.jsonl").open("w") as f:
        for i in range(images):
            line = lines[i * 7919 % len(lines)]
            predicted = None if line["predicted"] is None else i % 10
            f.write(json.dumps(line | {"index": i, "label": i % 10, "predicted": predicted}) + "\n")
    return seal(edit(run, lambda info: info["identity"].update(indices=list(range(images)))))


@pytest.mark.slow
def test_a_million_certificates_take_bounded_memory(tmp_path: Path) -> None:
    """At most 300 bytes a certificate beyond what a small run takes, in every format and for two compared."""
    count = 1_000_000
    for size, images in (("small", 1_000), ("large", count)):
        for name in ("one", "two"):
            million(tmp_path / size / name, name, images)

    def peak(size: str, *args: str) -> int:
        runs = [str(next((tmp_path / size / n).iterdir())) for n in ("one", "two")]
        words = ["compare", *runs] if args == ("compare",) else ["report", runs[0], *args, "--out", str(tmp_path / "o")]
        ran = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return int(ran.stderr.split()[-1])

    taken = {}
    for args in [*(("--format", f) for f in FORMATS), ("compare",)]:
        taken[args[-1]] = (peak("large", *args) - peak("small", *args)) / count / (2 if args == ("compare",) else 1)
    print(taken)
    assert max(taken.values()) <= 300, taken
