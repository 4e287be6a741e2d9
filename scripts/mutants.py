"""Break the code on purpose, one line at a time, and report which mistakes the tests miss.

    python scripts/mutants.py [--only NAME]... [--jobs N] [--list]        (make mutants)

``mutants.toml`` lists the mutants: a file, a text that occurs in it once, the text that replaces it, and the tests
that should then fail. Each mutant is applied to a temporary copy of the tree; the checkout is never changed. The tests
must pass on an unchanged copy first. A mutant that is listed as surviving says why no test can tell it from the
original. Exit code 0: all others are killed. 1: one survived, one listed as surviving was killed, or one is broken:
its tests could not run. 2: the list does not fit the code, or the tests fail without a mutant.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")
COPIED = ("bench", "defenses", "datasets", "reports", "scripts", "tests", "pyproject.toml")
TIMEOUT = 300  # seconds for the tests of one mutant; a timeout counts as killed
# Runs in the copy, and checks that the editable install does not provide the checkout's code instead.
PROGRAM = """
import sys, pathlib, bench
if not pathlib.Path(bench.__file__).resolve().is_relative_to(pathlib.Path.cwd().resolve()):
    sys.exit(f"imported {bench.__file__}, not the copy in {pathlib.Path.cwd()}")
import hypothesis, pytest
from hypothesis import Phase
# The first failing example is enough: do not shrink it. conftest.py's own profile inherits this.
hypothesis.settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
hypothesis.settings.load_profile("mutants")
sys.exit(pytest.main(sys.argv[1:]))
"""


class Failed(Exception):
    """The list does not fit the code, or the tests fail without a mutant."""


@dataclass(frozen=True)
class Mutant:
    """One mistake, and the tests that should find it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""  # why no test can tell it from the original


class Outcome(NamedTuple):
    """The result for one mutant; ``why``: the first test that failed, or why the tests could not run."""

    mutant: Mutant
    state: Literal["killed", "survived", "broken"]
    why: str
    seconds: float

    @property
    def expected(self) -> bool:
        """Whether the list expects this state."""
        return self.state == ("survived" if self.mutant.survives else "killed")


def load(path: Path, root: Path) -> list[Mutant]:
    """Read the list. Raises Failed naming the entries that do not fit the code."""
    groups = tomllib.loads(path.read_text())
    found = [Mutant(name, **{**entry, "tests": tuple(entry["tests"])}) for name, entry in groups.items()]
    if problems := [problem for mutant in found for problem in misfits(mutant, root)]:
        raise Failed("\n".join(problems))
    return found


def misfits(mutant: Mutant, root: Path) -> Iterator[str]:
    """Yield a line for each part of an entry that does not fit the code."""
    file = root / mutant.file
    count = file.read_text().count(mutant.old) if file.is_file() else 0
    if count != 1:
        yield f"{mutant.name}: old occurs {count} times in {mutant.file}, not once: {mutant.old!r}"
    if mutant.old == mutant.new:
        yield f"{mutant.name}: old and new are the same"
    for test in mutant.tests:
        path, _, name = test.partition("::")
        text = (root / path).read_text() if (root / path).is_file() else ""
        if f"def {name.partition('[')[0] or 'test_'}" not in text:
            yield f"{mutant.name}: no such test: {test}"


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """Copy the tree to a temporary folder, without caches."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            source, target = root / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif source.exists():
                shutil.copy(source, target)
        yield Path(folder)


def run_tests(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests on the code in ``tree`` until one fails, with the same random examples every time."""
    # Bytecode is matched by time and size, which a mutant may share with the original: write none.
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={tree / '.tmp'}"]
    command = [sys.executable, "-c", PROGRAM, *options, *tests]
    ran = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if ran.returncode not in (0, 1) or (ran.returncode and not first_failure(ran.stdout)):
        raise Failed(f"the tests did not run (exit code {ran.returncode}):\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    return ran


def first_failure(output: str) -> str:
    """Name the test that failed in pytest's output; empty where none did."""
    lines = (line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    return next((line.partition(" ")[2].partition(" - ")[0] for line in lines), "")


def attempt(mutant: Mutant, pristine: Path) -> Outcome:
    """Apply a mutant to a copy and run its tests."""
    began = time.monotonic()
    with copied(pristine) as tree:
        file = tree / mutant.file
        file.write_text(file.read_text().replace(mutant.old, mutant.new))
        state: Literal["killed", "survived", "broken"]
        try:
            ran = run_tests(tree, mutant.tests)
            state, why = ("killed", first_failure(ran.stdout)) if ran.returncode else ("survived", "")
        except subprocess.TimeoutExpired:
            state, why = "killed", f"timeout of {TIMEOUT} s"
        except Failed as e:
            state, why = "broken", str(e)
    return Outcome(mutant, state, why, time.monotonic() - began)


def progress(outcomes: Sequence[Outcome], total: int, began: float) -> str:
    """Describe the last outcome and how long the rest may take."""
    last, left = outcomes[-1], total - len(outcomes)
    seconds = (time.monotonic() - began) / len(outcomes) * left
    rest = f", about {seconds / 60:.0f} min left" if left else ""
    return f"{len(outcomes)}/{total} {last.state}: {last.mutant.name} ({last.seconds:.0f} s){rest}"


def table(outcomes: Sequence[Outcome]) -> str:
    """List every mutant with the test that killed it or the reason why none does."""
    width = max(len(o.mutant.name) for o in outcomes)
    rows = []
    for o in outcomes:
        said = o.why or o.mutant.survives or "NO TEST FAILS"
        if o.state == "killed" and o.mutant.survives:
            said = f"listed as surviving, but killed by {o.why}"
        rows.append(f"{o.mutant.name:{width}}  {o.state:8}  {said}")
    return "\n".join(rows)


def chosen(mutants: Sequence[Mutant], only: Sequence[str]) -> list[Mutant]:
    """Select mutants by name. Raises Failed for an unknown name."""
    if unknown := set(only) - {m.name for m in mutants}:
        raise Failed(f"unknown mutant: {', '.join(sorted(unknown))}; --list shows all")
    return [m for m in mutants if not only or m.name in only]


def judge(mutants: Sequence[Mutant], root: Path, jobs: int) -> list[Outcome]:
    """Try every mutant, ``jobs`` at a time, in the order of the list. Raises Failed where an original fails."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with copied(root) as pristine:
        print(f"{len(mutants)} mutants; first {len(tests)} tests on the original", file=sys.stderr)
        with copied(pristine) as tree:
            ran = run_tests(tree, tests)
        if ran.returncode:
            raise Failed(f"a test fails without any mutant: {first_failure(ran.stdout)}\n{ran.stdout[-3000:]}")
        outcomes, began = list[Outcome](), time.monotonic()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in as_completed([pool.submit(attempt, mutant, pristine) for mutant in mutants]):
                    outcomes.append(future.result())
                    print(progress(outcomes, len(mutants), began), file=sys.stderr, flush=True)
            except BaseException:  # Ctrl-C: do not start the rest
                pool.shutdown(cancel_futures=True)
                raise
    return sorted(outcomes, key=lambda o: mutants.index(o.mutant))


def main(words: Sequence[str] | None = None, root: Path = ROOT, path: Path = LIST) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description="Break the code on purpose and report which mistakes the tests miss.")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="try this mutant; may be repeated")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="list the mutants and exit")
    args = parser.parse_args(words)
    try:
        mutants = chosen(load(path, root), args.only)
        if args.list:
            print("\n".join(f"{m.name}: {m.file}: {m.old!r} -> {m.new!r}" for m in mutants))
            return 0
        outcomes = judge(mutants, root, max(1, args.jobs))
    except Failed as e:
        print(e, file=sys.stderr)
        return 2
    print(table(outcomes))
    missed = [o for o in outcomes if not o.expected]
    count = Counter(o.state for o in outcomes)
    print(", ".join(f"{count[state]} {state}" for state in ("killed", "survived", "broken")))
    print(f"not as listed: {', '.join(o.mutant.name for o in missed) or 'none'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
