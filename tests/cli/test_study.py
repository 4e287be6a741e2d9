"""Test study files: what they run, how they resume, what they refuse, and the report of one study."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from bench.errors import BenchError
from bench.options import RunOptions
from bench.runs import study
from bench.runs.plan import make_plans
from tests.cli.test_options import OPTIONS, parsed
from tests.helpers.commands import TINY, Bench

TEXT = f"""# tiny, on purpose
dataset = {json.dumps(TINY)}
sigma = [0.25, 0.5]
examples = 4
n0 = 10

[[run]]
defense = "none"

[[run]]
defense = ["none", "lora"]  # none is in the study already
set = ["rank=2"]
sigma = 0.25
"""
LABELS = ("tiny-none-s0.25, seed 0", "tiny-none-s0.5, seed 0", "tiny-lora-s0.25, rank=2, seed 0")


def written(folder: Path, text: str = TEXT, name: str = "study.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The certificates of each run, without seconds."""
    found = {}
    for file in sorted(folder.glob("*/certificates.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.parent.name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return found


# Running ----------------------------------------------------------------------------------------------


def test_a_study_does_the_runs_that_its_options_would_do(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path / "study")
    ran = bench("run", file)
    assert ran.code == 0, ran.err
    assert "1 of its 2 runs are in the study already; done once" in ran.err
    head, *others = [line for line in ran.err.splitlines() if "left in all" in line]
    assert "study.toml: 3 runs, at most 1,320 votes\n" in ran.err
    assert re.fullmatch(r"bench: about \d+ s left in all \(an estimate\), by a short timing of .*", head)
    assert len(others) == 2
    for number, label in enumerate(LABELS, 1):
        assert f"bench: run {number} of 3: {label}" in ran.err
    assert ran.err.index("left in all") < ran.err.index("run 1 of 3")
    shared = ("--dataset", TINY, "--examples", 4, "--n0", 10, "--out", tmp_path / "typed")
    for words in ("--defense none --sigma .25,.5", "--defense lora --set rank=2"):
        assert bench("run", *shlex.split(words), *shared).code == 0
    assert runs(file.parent / "runs") == runs(tmp_path / "typed") and len(runs(tmp_path / "typed")) == 3

    before = runs(file.parent / "runs")
    again = bench("run", file)
    assert again.code == 0 and again.err.count("already complete, nothing to do") == 3
    assert "3 runs, 3 of them finished" in again.err
    assert "about 0 s left in all (an estimate), by what" in again.err
    assert again.out == ran.out and runs(file.parent / "runs") == before


def test_out_replaces_the_folder_beside_the_file(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path, TEXT.replace("[0.25, 0.5]", "0.25").split("[[run]]\ndefense = [")[0])
    ran = bench("run", file, "--out", tmp_path / "elsewhere", "--json")
    assert ran.code == 0 and len(json.loads(ran.out)) == 1
    assert not (tmp_path / "runs").exists() and len(runs(tmp_path / "elsewhere")) == 1
    refused = bench("report", file)
    assert refused.code == 2 and refused.err.count("\n") == 1 and "OUT/study.study.json" in refused.err
    report = bench("report", tmp_path / "elsewhere" / "study.study.json", "--format", "csv")
    assert report.code == 0 and report.out.count("\n") == 2


def test_a_dry_run_prints_the_whole_bill_and_does_nothing(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path)
    bill = bench("run", file, "--dry-run")
    assert bill.code == 0, bill.err
    for label in LABELS:
        assert f"{label}: 4 images, 440 votes" in bill.out
    assert "total: 1,320 votes" in bill.out
    assert [f.name for f in tmp_path.iterdir()] == ["study.toml"]
    assert [row["label"] for row in json.loads(bench("run", file, "--dry-run", "--json").out)] == list(LABELS)


def test_a_dry_run_leaves_out_what_is_finished(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path)
    first = written(tmp_path / "first", TEXT.replace("[0.25, 0.5]", "0.25"))  # the runs at the smaller sigma
    assert bench("run", first, "--out", tmp_path / "runs").code == 0
    bill = bench("run", file, "--dry-run")
    assert bill.code == 0 and f"{file}: 2 of 3 runs are finished in {tmp_path / 'runs'}" in bill.err
    assert "total: 440 votes" in bill.out
    assert [row["label"] for row in json.loads(bench("run", file, "--dry-run", "--json").out)] == [LABELS[1]]


def test_a_killed_study_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    text = TEXT.replace("n0 = 10", "n0 = 10\nn = 4000").replace("examples = 4", "examples = 12")
    whole, killed = written(tmp_path / "whole", text), written(tmp_path / "killed", text)
    process = subprocess.Popen([sys.executable, "-m", "bench", "run", killed], stderr=subprocess.DEVNULL, stdout=-3)
    second = "tiny-none-s0.5-*/certificates.jsonl"
    while process.poll() is None and not any(f.read_text() for f in (killed.parent / "runs").glob(second)):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = runs(killed.parent / "runs")
    assert len(before) == 2 and [len(lines) for lines in before.values()] != [12, 12]

    report = bench("report", killed, "--format", "csv")
    assert report.code == 1 and report.out.count("\n") == 2
    assert f"study.toml: 2 of 3 runs are not finished: {'; '.join(LABELS[1:])}" in report.err

    ran = bench("run", killed)
    assert ran.code == 0 and "3 runs, 1 of them finished" in ran.err, ran.err
    after = runs(killed.parent / "runs")
    assert all(after[name][: len(lines)] == lines for name, lines in before.items())
    assert bench("run", whole).code == 0
    assert after == runs(whole.parent / "runs")
    assert bench("report", killed, "--format", "csv").code == 0


def test_a_shard_is_named_by_the_folder_of_its_run(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path)
    assert bench("run", file, "--shard", "1/2").code == 0
    assert bench("report", file).code == 2  # no run is whole
    assert bench("run", file, "--shard", "2/2").code == 0
    assert bench("merge", tmp_path / "runs").code == 0
    report = bench("report", file, "--format", "csv")
    assert report.code == 0 and report.out.count("\n") == 4, report.err


def test_a_failed_run_leaves_the_others_and_is_named(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from bench.interface import Access, Defense\n\n\n"
        "class Broken(Defense):\n    access = Access.QUERY\n\n"
        "    def logits(self, x, draw):\n        raise ValueError('no')\n"
    )
    text = TEXT.split("[[run]]")[0] + f'[[run]]\ndefense = "{broken}"\nsigma = 0.25\n\n[[run]]\ndefense = "none"\n'
    file = written(tmp_path, text)
    ran = bench("run", file)
    assert ran.code == 2 and "run 1 of 3 failed" in ran.err
    assert "run 3 of 3" in ran.err and len(list((tmp_path / "runs").glob("*none*"))) == 2
    report = bench("report", file, "--format", "csv")
    assert report.code == 1 and "1 of 3 runs are not finished: tiny-broken-s0.25, seed 0" in report.err


# Refusals ---------------------------------------------------------------------------------------------

RUN = '[[run]]\ndefense = "none"\ndataset = "digits"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no runs"),
        ('[run]\ndefense = "none"\n', "write [[run]]"),
        ("run = 3\n", "write [[run]]"),
        ("sigma = \n", "not TOML"),
        ("sigmas = 1\n" + RUN, "defaults: unknown key 'sigmas'; did you mean sigma"),
        (RUN + 'out = "there"\n', "[[run]] 1: unknown key 'out'"),
        (RUN + RUN + "device = 1\n", "[[run]] 2: unknown key 'device'"),
        (RUN + "sigma = true\n", "[[run]] 1: sigma: must be text or a number, or a list of them, not true"),
        (RUN + "sigma = [[0.25]]\n", "[[run]] 1: sigma: must be"),
        (RUN + "n = 1e3\n", "[[run]] 1: n: must be a whole number, not 1000.0"),
        (RUN + 'n = "1000"\n', '[[run]] 1: n: must be a whole number, not "1000"'),
        (RUN + "alpha = false\n", "[[run]] 1: alpha: must be a number, not false"),
        (RUN + "procedure = 1\n", "[[run]] 1: procedure: must be text, not 1"),
        (RUN + 'split = ["test"]\n', '[[run]] 1: split: must be text, not ["test"]'),
        (RUN + "set = { rank = 1 }\n", "[[run]] 1: set: must be text, or a list of them"),
        (RUN + "train-sigma = 1\ntrain_sigma = 1\n", "[[run]] 1: train_sigma: given twice"),
        ('dataset = "digits"\n[[run]]\nsigma = 1\n', "[[run]] 1: no defense"),
        (RUN + 'procedure = "both"\n', "[[run]] 1: unknown --procedure 'both'"),
        (RUN + 'objective = "dign"\n', "[[run]] 1: --objective dign has no effect"),
    ],
)
def test_a_wrong_study_is_one_line_naming_file_table_and_key(
    bench: Bench, tmp_path: Path, text: str, problem: str
) -> None:
    file = written(tmp_path, text)
    result = bench("run", file)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert str(file) in result.err and problem in result.err
    assert [f.name for f in tmp_path.iterdir()] == ["study.toml"]


@pytest.mark.parametrize("words", ["--sigma .25", "--set rank=2", "--defense none", "--save-study other.toml"])
def test_options_that_decide_results_are_refused_beside_a_study(bench: Bench, tmp_path: Path, words: str) -> None:
    file = written(tmp_path)
    result = bench("run", file, *words.split())
    assert result.code == 2 and result.err.count("\n") == 1 and words.split()[0] in result.err
    assert [f.name for f in tmp_path.iterdir()] == ["study.toml"]


def test_a_study_file_is_a_toml_file(bench: Bench, tmp_path: Path) -> None:
    result = bench("run", written(tmp_path, TEXT, "study.txt"))
    assert result.code == 2 and result.err.count("\n") == 1 and "a study file is a .toml file" in result.err


def test_a_missing_study_is_one_line(bench: Bench, tmp_path: Path) -> None:
    for command in ("run", "report"):
        result = bench(command, tmp_path / "none.toml")
        assert result.code == 2 and result.err.count("\n") == 1 and "none.toml" in result.err


# Saving -----------------------------------------------------------------------------------------------

BASE = Path(__file__).parents[2] / "reports" / "baselines" / "digits-vit.safetensors"
COMMANDS = [
    "--defense none --dataset digits",
    "--defense none,lora --dataset digits --sigma .25,.5,1 --seed 0,1 --set rank=2,4 --set lora.lora_alpha=8",
    "--defense lora --dataset digits --search lr=1e-4,1e-3 --train-sigma .5 --objective consistency --preset standard",
    "--defense all --dataset cifar10 --procedure anytime --target correct --radii .25,0.50,1 --n 10000 --alpha 1e-5",
    "--defense full --dataset digits --examples every:3 --noise float --arithmetic bfloat16,channels-last --n0 5",
    "--defense head --dataset digits --examples 30 --split validation",
    f"--defense none --dataset digits --base {BASE} --mean .1 --std 1",
]


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_saved_study_makes_the_plans_of_the_command(bench: Bench, tmp_path: Path, typed: str) -> None:
    file, words = tmp_path / "new" / "saved.toml", shlex.split(typed)
    saved = bench("run", *words, "--save-study", file)
    assert saved.code == 0, saved.err
    assert saved.err.splitlines()[-1] == f"bench: bench run {file} makes the runs of this command"
    assert [f.name for f in file.parent.iterdir()] == ["saved.toml"]  # and nothing was run
    of_study, of_command = study.read(file).plans(), make_plans(parsed(words)[0])
    # A plan's options keep how these lists were written, which decides nothing.
    for a, b in zip(of_study, of_command, strict=True):
        assert replace(a, options=b.options) == b
        assert replace(a.options, radii=None, mean=None, std=None) == replace(
            b.options, radii=None, mean=None, std=None
        )
    assert bench("run", *words, "--save-study", file).code == 0  # the same text


@given(OPTIONS)
def test_any_text_in_options_is_read_back_from_a_saved_study(
    tmp_path_factory: pytest.TempPathFactory, options: RunOptions
) -> None:
    file = tmp_path_factory.mktemp("saved") / "saved.toml"
    study.save(options, file)
    (found,) = study.read(file).runs
    for one in fields(RunOptions):
        value, again = getattr(options, one.name), getattr(found, one.name)
        if one.metadata["several"] and value is not None:
            value, again = ([as_number(w.strip()) for w in v.split(",") if w.strip()] for v in (value, again))
        elif one.name == "examples" and value is not None:
            value, again = as_number(value), as_number(again)
        assert value == again or str(value) == str(again) == "nan"


def as_number(word: str) -> object:
    """A number where the word may be read as one with a fraction, else the word."""
    try:
        return str(float(word)) if re.search("[.eE]", word) else word
    except ValueError:
        return word


def test_numbers_in_a_saved_study_are_those_that_were_typed(tmp_path: Path) -> None:
    for number, (typed, expected) in enumerate(
        [("007", "007"), ("1_0", "1_0"), (".25,1", "0.25,1"), ("1e-3", "0.001"), ("nan", "nan"), ("+1.5", "1.5")]
    ):
        file = tmp_path / f"{number}.toml"
        study.save(RunOptions(defenses="none", dataset="digits", sigma=typed), file)
        assert study.read(file).runs[0].sigma == expected


def test_another_file_is_not_overwritten(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path)
    result = bench("run", "--defense", "none", "--dataset", "digits", "--save-study", file)
    assert result.code == 2 and result.err.count("\n") == 1 and "another file is there" in result.err
    assert file.read_text() == TEXT
    with pytest.raises(BenchError, match="another file"):
        study.save(RunOptions(defenses="none", dataset="digits"), tmp_path)


# The report -------------------------------------------------------------------------------------------


class Pre(HTMLParser):
    """Reads the text of the study as a browser shows it: without the first line break of a pre."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside, self.text = False, ""
        self.feed(page[page.index('<details id="study">') :].split("</details>")[0])
        self.text = self.text.removeprefix("\n")

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside = tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside else ""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study beside whose runs there is another run."""
    from bench.cli import main

    text = "\n" + TEXT.replace("# tiny", "# <b>&amp;</b> π \\\\ tiny")
    file = written(tmp_path_factory.mktemp("done"), text)
    other = ["--defense", "head", "--dataset", TINY, "--examples", "4", "--n0", "10"]
    for words in ([str(file)], [*other, "--out", str(file.parent / "runs")]):
        with pytest.raises(SystemExit) as stop:
            main(["run", *words])
        assert not stop.value.code
    return file


def test_the_report_of_a_study_has_its_runs_alone(bench: Bench, done: Path) -> None:
    everything = bench("report", done.parent / "runs", "--format", "csv")
    assert "head" in everything.out and everything.out.count("\n") == 5
    by_file = bench("report", done, "--format", "csv")
    assert by_file.code == 0 and by_file.out.count("\n") == 4 and "head" not in by_file.out
    assert bench("report", done.parent, "--format", "csv").out == by_file.out


def test_the_pages_are_written_beside_the_file_with_its_text(bench: Bench, done: Path) -> None:
    result = bench("report", done)
    assert result.code == 0, result.err
    sha256 = hashlib.sha256(done.read_bytes()).hexdigest()
    assert f"Runs of the study study.toml, sha256 {sha256}." in result.out
    assert (done.parent / "report.md").read_text().startswith(result.out.rstrip("\n"))
    page = (done.parent / "report.html").read_text()
    assert sha256 in page and "<b>&amp;</b>" not in page
    assert Pre(page).text == done.read_text()


def test_a_copied_back_text_runs_the_same(bench: Bench, done: Path, tmp_path: Path) -> None:
    bench("report", done)
    copy = written(tmp_path, Pre((done.parent / "report.html").read_text()).text, "copy.toml")
    ran = bench("run", copy, "--out", done.parent / "runs")
    assert ran.code == 0 and ran.err.count("already complete") == 3
    (done.parent / "runs" / "copy.study.json").unlink()


def test_a_changed_file_is_reported(bench: Bench, done: Path) -> None:
    before = done.read_text()
    done.write_text(before + "# changed\n")
    try:
        result = bench("report", done, "--format", "csv")
    finally:
        done.write_text(before)
    assert result.code == 1 and "was changed since it was run" in result.err and result.out.count("\n") == 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": "dataset = 1"}, "sha256: not that of text"),
        ({"schema": 2}, "schema"),
        ({"runs": [{"label": "x", "arguments": {}, "folder": "../runs"}]}, "folder"),
        ({"runs": [{"label": "x\x1b", "arguments": {}, "folder": ".."}]}, "1 of 1 runs are not finished: x\\x1b"),
    ],
)
def test_results_that_bench_did_not_write_are_refused(
    bench: Bench, done: Path, change: dict[str, Any], problem: str
) -> None:
    forged = done.parent / "runs" / "forged.study.json"
    forged.write_text(json.dumps(json.loads((forged.parent / "study.study.json").read_text()) | change))
    result = bench("report", forged, "--format", "csv")
    several = bench("report", done.parent)
    forged.unlink()
    assert result.code == 2 and problem in result.err and "Traceback" not in result.err
    assert several.code == 2 and "has 2 studies; give one" in several.err


def test_results_are_never_part_of_an_identity(done: Path) -> None:
    for file in (done.parent / "runs").glob("*/run.json"):
        assert "study" not in json.dumps(json.loads(file.read_text())["identity"])


def test_an_edited_study_keeps_the_runs_that_stay(bench: Bench, tmp_path: Path) -> None:
    file = written(tmp_path)
    assert bench("run", file).code == 0
    file.write_text(TEXT + '\n[[run]]\ndefense = "head"\nsigma = 0.25\n')
    ran = bench("run", file)
    assert ran.code == 0 and "4 runs, 3 of them finished" in ran.err
    assert bench("report", file, "--format", "csv").out.count("\n") == 5
    results = json.loads((tmp_path / "runs" / "study.study.json").read_text())
    assert results["text"] == file.read_text() and all(run["folder"] for run in results["runs"])


def test_report_of_a_study_imports_no_torch(done: Path) -> None:
    code = (
        "import sys\nfrom bench.cli import main\n"
        f"try: main(['report', {str(done)!r}, '--format', 'csv'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
