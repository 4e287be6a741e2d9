"""Other people's defenses: an installed package, the doctor, and the pages that teach how to write one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import TINY, Result, defense

Bench = Callable[..., Result]
HERE = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/plugin_package, installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*pip, str(target), str(HERE / "plugin_package")], capture_output=True, text=True)
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


def test_doctor_says_what_to_mend(bench: Bench) -> None:
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


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE.parent / "docs" / "add-a-defense.md").read_text(), re.S)


def code_lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def test_the_defense_of_the_docs_runs(bench: Bench, tmp_path: Path) -> None:
    (text,) = blocks("python")
    assert code_lines(text) <= 25
    (tmp_path / "my_defense.py").write_text(text)
    assert bench("doctor", tmp_path / "my_defense.py", "--dataset", TINY).code == 0
    ran = bench("run", "--defense", tmp_path / "my_defense.py", "--dataset", TINY, "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    (info,) = json.loads(ran.out)
    assert info["cost"]["trainable_updated"] == 10


def test_the_defense_of_the_readme_runs(bench: Bench, tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.S)
    (tmp_path / "my_defense.py").write_text(text)
    assert bench("doctor", tmp_path / "my_defense.py", "--dataset", TINY).code == 0


def test_the_data_set_of_the_docs_runs(bench: Bench, tmp_path: Path) -> None:
    from PIL import Image

    (text,) = blocks("toml")
    assert code_lines(text) <= 12
    (tmp_path / "pets.toml").write_text(text)
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    ran = bench(
        "run", "--defense", "none,lora", "--dataset", tmp_path / "pets.toml", "--out", tmp_path / "runs", "--json"
    )
    assert ran.code == 0, ran.err
    assert [len(r["identity"]["indices"]) for r in json.loads(ran.out)] == [4, 4]
