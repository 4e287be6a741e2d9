"""What commands import: torch costs a second or more, so those that only read files do without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, Bench
from tests.helpers.records import made_up

HEAVY = {"torch", "timm", "transformers", "diffusers", "peft", "sklearn", "plotly"}
PLAIN = HEAVY | {"pandas", "matplotlib", "pyarrow"}


def imported(*words: object) -> set[str]:
    """Call a command in a process of its own; return the top-level modules that it imported."""
    code = (
        "import json, sys\nfrom bench.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as e: code = e.code\n"
        "print(json.dumps([code, sorted({m.partition('.')[0] for m in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, None), done.stderr
    return set(modules)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    made_up(out, [0.3, 0.2, None], name="lora")
    made_up(out, [0.3, None, None], name="none")
    return out


def test_help_imports_only_the_command_line() -> None:
    for words in (["--help"], ["run", "--help"], ["predict", "--help"]):
        assert not (PLAIN | {"scipy", "numpy"}) & imported(*words)


def test_commands_that_read_records_import_no_torch(runs: Path, tmp_path: Path) -> None:
    first, second = sorted(runs.iterdir())
    assert not PLAIN & imported("status", runs)
    assert not PLAIN & imported("export", runs, "--record", tmp_path / "copies")
    assert not PLAIN & imported("export", first)
    assert not HEAVY & imported("report", runs)
    assert not HEAVY & imported("report", runs, "--out", tmp_path / "report")
    assert not HEAVY & imported("compare", first, second)
    assert not HEAVY & imported("publish", runs, "--to", tmp_path / "published")


def test_merging_shards_imports_no_torch(bench: Bench, tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        words = ("--defense", "none", "--dataset", TINY, "--shard", shard, "--out", tmp_path)
        done = bench("run", *words)
        assert done.code == 0 and "bench: loading" not in done.err  # that is for terminals
    assert not PLAIN & imported("merge", tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_run_says_at_once_what_it_loads(tmp_path: Path) -> None:
    """On a terminal the first line comes before torch is imported, the second before data and base are read."""
    import pty

    words = ["--defense", "none", "--dataset", TINY, "--out", str(tmp_path)]
    code = (
        "import builtins, sys\nfrom bench.cli import main\noriginal = builtins.__import__\n"
        "def logged(name, *rest, **more):\n"
        "    if name == 'torch' and 'torch' not in sys.modules: print('importing torch', file=sys.stderr, flush=True)\n"
        "    return original(name, *rest, **more)\n"
        "builtins.__import__ = logged\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "run", *words]
    parent, child = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=child) as process:
        os.close(child)
        shown = b""
        try:
            while data := os.read(parent, 4096):
                shown += data
        except OSError:  # Linux reports the end of a pseudo-terminal so
            pass
    os.close(parent)
    assert process.returncode == 0, shown
    lines = shown.decode().splitlines()
    assert lines.index("bench: loading torch and timm") < lines.index("importing torch")
    assert lines.index("importing torch") < lines.index("bench: loading tiny and base vit")
    assert lines.index("bench: loading tiny and base vit") < next(i for i, x in enumerate(lines) if "base vit: " in x)
