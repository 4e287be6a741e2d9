"""The mutation program: its list fits the code, it tests the copy, and surviving mutants are reported."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest

CODE = '"""A small package."""\n\n\ndef double(x: int) -> int:\n    y = 2 * x\n    return y\n'
TEST = "from bench import double\n\n\ndef test_double() -> None:\n    assert double(2) == 4\n"
MUTANT = (
    '[{name}]\nfile = "bench/__init__.py"\nold = "{old}"\nnew = "{new}"\ntests = ["tests/test_it.py::test_double"]\n'
)


def tree(root: Path, *entries: str) -> Path:
    """Write a small package with one test and a list of mutants; return the list's path."""
    for file, text in (("bench/__init__.py", CODE), ("tests/test_it.py", TEST), ("pyproject.toml", "[project]\n")):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    path = root / "mutants.toml"
    path.write_text("\n".join(entries))
    return path


def test_every_mutant_fits_the_code() -> None:
    found = mutants.load(mutants.LIST, mutants.ROOT)
    assert len(found) > 100


def test_entries_that_do_not_fit_the_code_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tree(
        tmp_path,
        MUTANT.format(name="gone", old="3 * x", new="x"),
        MUTANT.format(name="twice", old="y", new="z"),
        MUTANT.format(name="same", old="2 * x", new="2 * x"),
        MUTANT.format(name="untested", old="2 * x", new="x").replace("test_double", "test_triple"),
    )
    assert mutants.main(["--list"], tmp_path, path) == 2
    said = capsys.readouterr().err
    assert "gone: old occurs 0 times" in said and "twice: old occurs 2 times" in said
    assert "same: old and new are the same" in said and "untested: no such test" in said


def test_survivors_and_wrong_reasons_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    equal = MUTANT.format(name="equal", old="2 * x", new="x + x")
    path = tree(
        tmp_path,
        MUTANT.format(name="dead", old="2 * x", new="3 * x"),
        equal + 'survives = "the same number"\n',
        equal.replace("equal", "alive"),
        MUTANT.format(name="wrong", old="2 * x", new="3 * x") + 'survives = "wrongly"\n',
        MUTANT.format(name="broken", old="2 * x", new="2 *"),
    )
    assert mutants.main(["--jobs", "2"], tmp_path, path) == 1
    out, err = capsys.readouterr()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.strip()}
    assert rows["dead"] == "killed tests/test_it.py::test_double"
    assert rows["equal"] == "survived the same number"
    assert rows["alive"] == "survived NO TEST FAILS"
    assert rows["wrong"] == "killed listed as surviving, but killed by tests/test_it.py::test_double"
    assert rows["broken"].startswith("broken the tests did not run")
    assert "2 killed, 2 survived, 1 broken\nnot as listed: alive, wrong, broken" in out
    assert "1/5 " in err and "min left" in err and "5/5 " in err
    assert (tmp_path / "bench" / "__init__.py").read_text() == CODE  # the checkout is unchanged
    assert mutants.main(["--list", "--only", "dead"], tmp_path, path) == 0
    assert capsys.readouterr().out == "dead: bench/__init__.py: '2 * x' -> '3 * x'\n"
    assert mutants.main(["--only", "ghost"], tmp_path, path) == 2


def test_a_test_that_fails_without_a_mutant_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tree(tmp_path, MUTANT.format(name="any", old="2 * x", new="3 * x"))
    (tmp_path / "tests" / "test_it.py").write_text(TEST.replace("== 4", "== 5"))
    assert mutants.main([], tmp_path, path) == 2
    assert "a test fails without any mutant: tests/test_it.py::test_double" in capsys.readouterr().err


@pytest.mark.slow
def test_every_mutant_is_killed_or_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main([]) == 0, capsys.readouterr().out
