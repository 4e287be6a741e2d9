"""Plug-ins: installed packages, and how the doctor examines a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
PACKAGE = Path(__file__).parents[1] / "helpers" / "plugin_package"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example package by pip into a temporary folder."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*pip, str(target), str(PACKAGE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def plugin(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed))


@pytest.mark.usefixtures("plugin")
def test_an_installed_plugin_is_listed_and_runs(bench: Bench, tmp_path: Path) -> None:
    rows = {r["name"]: r for r in json.loads(bench("list", "--json").out)}
    assert rows["median"]["summary"] == "A median filter in front of the base."
    assert rows["median"]["access"] == "QUERY"
    assert rows["none"]["where"] == "built in"
    assert "not importable" in rows["absent"]["summary"]
    ran = bench("run", "--defense", "median,none", "--dataset", TINY, "--out", tmp_path, "--json")
    assert ran.code == 0, ran.err
    assert [r["identity"]["defense"]["name"] for r in json.loads(ran.out)] == ["median", "none"]
    assert bench("doctor", "median", "--dataset", TINY).code == 0


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(("name", "words"), [("broken", "needs a library"), ("absent", "No module named")])
def test_a_broken_plugin_fails_only_when_selected(bench: Bench, tmp_path: Path, name: str, words: str) -> None:
    failed = bench("run", "--defense", name, "--dataset", TINY, "--out", tmp_path)
    assert failed.code == 2
    assert name in failed.err
    assert words in failed.err
    assert len(failed.err.strip().splitlines()) == 1
    assert bench("run", "--defense", "none", "--dataset", TINY, "--out", tmp_path).code == 0


def test_doctor_explains_how_to_fix_a_defense(bench: Bench) -> None:
    sick = bench("doctor", defense("batch_average"), "--dataset", TINY)
    assert sick.code == 1
    assert "FAIL:" in sick.out
    assert "other rows of its batch" in sick.out
    as_json = bench("doctor", defense("batch_average"), "--dataset", TINY, "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)[-1]["problem"]
    well = bench("doctor", "lora", "--dataset", TINY)
    assert well.code == 0
    assert well.out.count("ok:") == 7
    assert bench("doctor", "./nowhere.py").code == 2
