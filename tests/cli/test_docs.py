"""The examples of README.md and docs/add-a-defense.md, run as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]
ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "add-a-defense.md").read_text(), re.S)


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
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
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
