"""Test that a record holds one fixed function: careless defenses are refused, sound ones are certified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records.writer import RunFolder
from bench.runs import writer
from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
CARELESS = defense("careless")
CHECKS = 30  # blocks that are computed before the first vote, at most


def args(how: str, out: Path, *more: object, name: str = CARELESS) -> list[object]:
    return ["run", "--defense", name, "--set", f"how={how}", "--dataset", TINY, "--out", out, *more]


def certificates(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("*/certificates.jsonl")
    rows = [{**json.loads(line), "seconds": 0} for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda r: r["index"])


def info(out: Path) -> dict[str, Any]:
    (file,) = out.glob("*/run.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Interrupt a run after a number of images, as Ctrl-C does."""
    real = RunFolder.append

    def append(self: RunFolder, certificate: Any) -> None:
        if len(self.done) == after:
            raise KeyboardInterrupt
        real(self, certificate)

    monkeypatch.setattr(RunFolder, "append", append)


# Threads ----------------------------------------------------------------------------------------------


def test_copies_that_share_a_buffer_vote_in_one_thread(
    bench: Bench, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    set_threads(2)
    result = bench(*args("global_buffer", tmp_path / "two"))
    assert result.code == 0
    assert "votes in one thread, not 2" in result.err and "change one another's logits" in result.err
    set_threads(1)
    assert bench(*args("global_buffer", tmp_path / "one")).code == 0
    assert certificates(tmp_path / "two") == certificates(tmp_path / "one")


def test_copies_that_share_a_buffer_later_are_refused(
    bench: Bench, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    """Not detected at the start: certificates are set aside at the end."""
    set_threads(2)
    more = ("--set", f"after={CHECKS}", "--n", "3000")
    result = bench(*args("global_buffer", tmp_path, *more))
    assert result.code == 2
    assert "set aside in" in result.err.splitlines()[-1] and "refused.jsonl" in result.err.splitlines()[-1]
    assert not list(tmp_path.glob("*/certificates.jsonl"))


def test_the_doctor_names_a_shared_buffer(bench: Bench) -> None:
    result = bench("doctor", CARELESS, "--set", "how=global_buffer", "--dataset", TINY)
    assert result.code == 1
    assert "change one another's logits" in result.out


# Resumes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
def test_drift_of_a_killed_process_is_detected_when_resuming(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None], procedure: str
) -> None:
    """The killed process had drifted, and its state is lost: only the counts show it."""
    set_threads(1)
    command = args("drifts", tmp_path, "--set", f"after={CHECKS}", "--examples", 30, "--n", 1000)
    command += ["--procedure", procedure]
    with monkeypatch.context() as patch:
        interrupt(patch, 28)
        assert bench(*command).code == 130
    assert len(certificates(tmp_path)) == 28
    resumed = bench(*command)
    assert resumed.code == 2
    assert "other counts than before the run was resumed" in resumed.err
    (aside,) = tmp_path.glob("*/refused.jsonl")
    assert len(aside.read_text().splitlines()) == 28
    assert not list(tmp_path.glob("*/certificates.jsonl"))


@pytest.mark.parametrize("name", ["none", defense("randomised")])
def test_an_honest_run_resumes_to_the_same_record(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    command = ["run", "--defense", name, "--dataset", TINY]
    assert bench(*command, "--out", tmp_path / "whole").code == 0
    for after in (1, 4, 7, 8):  # the last: all images are certified, and nothing is checked
        with monkeypatch.context() as patch:
            if after < 8:
                interrupt(patch, after)
            else:
                patch.setattr(writer.RunWriter, "finish", _interrupted)
            assert bench(*command, "--out", tmp_path / "resumed").code == 130
    assert bench(*command, "--out", tmp_path / "resumed").code == 0
    assert certificates(tmp_path / "resumed") == certificates(tmp_path / "whole")
    whole, resumed = info(tmp_path / "whole"), info(tmp_path / "resumed")
    assert whole["fingerprint"] == resumed["fingerprint"]
    assert resumed["audit"]["votes"] > 0


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_record_of_another_machine_is_compared_as_two_samples(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count that differs by one vote is a fault on the same machine, and rounding on another one."""
    command = ["run", "--defense", "none", "--dataset", TINY, "--out", tmp_path]
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert bench(*command).code == 130
    (file,) = tmp_path.glob("*/certificates.jsonl")
    row = json.loads(file.read_text())
    row["top_count"] -= 1
    file.write_text(json.dumps(row) + "\n")
    kept = shutil.copytree(file.parent, tmp_path.with_name("kept"))
    assert "other counts than before" in bench(*command).err
    shutil.rmtree(file.parent)
    shutil.copytree(kept, file.parent)
    path = file.parent / "run.json"
    said = json.loads(path.read_text())
    said["environment"]["device"] = said["fingerprint"]["machine"]["device"] = "another processor"
    path.write_text(json.dumps(said))
    assert bench(*command).code == 0


# Shards and files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["build_numpy", "build_python", "merges_at_random"])
def test_randomness_while_it_is_built_or_merged_is_the_same_in_every_shard(
    bench: Bench, tmp_path: Path, how: str
) -> None:
    command = args(how, tmp_path / "whole")
    if how == "merges_at_random":
        command = ["run", "--defense", defense(how), "--dataset", TINY, "--out", tmp_path / "whole"]
    assert bench(*command).code == 0
    for shard in ("1/2", "2/2"):
        assert bench(*command, "--out", tmp_path / "shards", "--shard", shard).code == 0
    assert bench("merge", tmp_path / "shards").code == 0
    assert certificates(tmp_path / "shards") == certificates(tmp_path / "whole")


READS = '''
from pathlib import Path
from bench.interface import Access, Defense

class Mine(Defense):
    """Read a number from a file that is not hashed."""
    access = Access.QUERY

    def build(self):
        self.gain = float(Path({path!r}).read_text())

    def logits(self, x, draw):
        return self.context.base(x * self.gain)
'''


def test_a_file_changed_between_shards_is_named_when_they_are_merged(bench: Bench, tmp_path: Path) -> None:
    mine, number = tmp_path / "mine.py", tmp_path / "gain"
    mine.write_text(READS.format(path=str(number)))
    command = ["run", "--defense", mine, "--dataset", TINY, "--out", tmp_path / "runs"]
    for shard, gain in (("1/3", "1.0"), ("2/3", "0.6"), ("3/3", "1.0")):
        number.write_text(gain)
        assert bench(*command, "--shard", shard).code == 0
    result = bench("merge", tmp_path / "runs")
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert "shard 2/3 certified another function than shard 1/3" in line
    assert not list((tmp_path / "runs").glob("*/certificates.jsonl"))


def test_a_file_changed_before_a_resume_is_refused_and_nothing_is_lost(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, number, out = tmp_path / "mine.py", tmp_path / "gain", tmp_path / "runs"
    mine.write_text(READS.format(path=str(number)))
    number.write_text("1.0")
    command = ["run", "--defense", mine, "--dataset", TINY, "--out", out]
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert bench(*command).code == 130
    number.write_text("0.6")
    result = bench(*command)
    assert result.code == 2
    assert "this process computes another function" in result.err.splitlines()[-1]
    number.write_text("1.0")
    assert bench(*command).code == 0
    (run,) = out.iterdir()
    number.write_text("0.6")
    result = bench("verify", run, "--defense", mine)
    assert result.code == 1
    assert "the function built here is not the one certified" in result.out


def test_a_helper_module_next_to_a_defense_is_part_of_its_source(bench: Bench, tmp_path: Path) -> None:
    """Imported directly or through another module; a file that is not imported is not part of it."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "my_defense.py").write_text(
        f"import sys\nsys.path.insert(0, {str(plugins)!r})\nimport my_helper\n"
        "from bench.interface import Access, Defense\n\n"
        "class Mine(Defense):\n    access = Access.QUERY\n\n"
        "    def logits(self, x, draw):\n        return self.context.base(x * my_helper.gain())\n"
    )
    (plugins / "my_helper.py").write_text("from my_numbers import GAIN\n\ndef gain():\n    return GAIN\n")
    (plugins / "my_numbers.py").write_text("GAIN = 0.6\n")
    (plugins / "unrelated.py").write_text("")
    command = ["run", "--defense", plugins / "my_defense.py", "--dataset", TINY, "--out", tmp_path / "runs"]
    assert bench(*command, "--shard", "1/2").code == 0
    (plugins / "unrelated.py").write_text("CHANGED = True")
    assert bench(*command, "--shard", "2/2").code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    (plugins / "my_numbers.py").write_text("GAIN = 0.7\n")
    assert bench(*command, "--shard", "2/2").code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


# Rows and fresh noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["odd_half_of_tile", "majority_of_tile_but_first"])
def test_rows_that_depend_on_their_tile_are_refused(bench: Bench, tmp_path: Path, how: str) -> None:
    result = bench(*args(how, tmp_path))
    assert result.code == 2
    assert "a row's logits change with the other rows of its batch" in result.err


CHEATS = ["draw_index", "knows_the_seed", "subtract_noise", "honest_when_checked"]


def cheating(how: str, out: Path) -> list[object]:
    return args(how, out, "--set", f"card={TINY}", "--set", f"after={CHECKS // 2}", "--n", 500, "--set", "n=512")


@pytest.mark.parametrize("how", CHEATS)
def test_certificates_that_hold_only_on_known_noise_are_set_aside(
    bench: Bench, tmp_path: Path, set_threads: Callable[[int], None], how: str
) -> None:
    set_threads(1)
    result = bench(*cheating(how, tmp_path))
    assert result.code == 2
    assert "its certificates do not hold on fresh noise: image" in result.err
    assert not list(tmp_path.glob("*/certificates.jsonl"))


@pytest.mark.parametrize("how", CHEATS)
def test_verify_on_fresh_noise_catches_what_redrawing_from_the_seed_misses(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None], how: str
) -> None:
    set_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(writer.RunWriter, "audit", lambda *_: None)
        assert bench(*cheating(how, tmp_path)).code == 0
    (run,) = tmp_path.iterdir()
    result = bench("verify", run, "--fresh", "--defense", CARELESS)
    assert result.code == 1
    assert "votes for class" in result.out and "on fresh noise" in result.out


@pytest.mark.parametrize("how", ["nan", "ties", "memorises"])
@pytest.mark.parametrize("procedure", ["fixed", "anytime"])
def test_honest_defenses_are_certified(bench: Bench, tmp_path: Path, how: str, procedure: str) -> None:
    assert bench(*args(how, tmp_path, "--set", f"card={TINY}", "--procedure", procedure, "--n", 1000)).code == 0
    assert info(tmp_path)["status"] == "complete"
    (run,) = tmp_path.iterdir()
    result = bench("verify", run, "--fresh", "--defense", CARELESS)
    assert result.code == 0, result.out
    assert "the certificates hold on fresh noise" in result.out


def test_the_audit_costs_little_and_is_recorded(bench: Bench, tmp_path: Path) -> None:
    """It costs 2% of the votes, at least one block, and is not counted among them."""
    assert bench("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path, "--n", 20_000).code == 0
    found = info(tmp_path)
    votes = len(found["audit"]["images"]) * found["audit"]["votes"]
    assert 256 <= votes <= 0.02 * found["cost"]["votes"]
    assert found["cost"]["votes"] == 8 * 20_020
