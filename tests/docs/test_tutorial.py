"""docs/tutorial.md, followed literally on made-up pictures: its card, and its commands in order, in a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docs_links import ROOT, prose
from PIL import Image

TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line, is_prose in prose(TEXT) if not is_prose and re.match(r" {4}bench ", line)]


def make_pictures(folder: Path) -> None:
    """Stripes whose direction and colour depend on the class, of several sizes."""
    rng = np.random.default_rng(0)
    for kind, name in enumerate(("finch", "robin", "wren")):
        (folder / name).mkdir(parents=True)
        colour = np.array([[1, 0.7, 0.5], [0.6, 1, 0.6], [0.5, 0.7, 1]])[kind]
        for number in range(90):
            height, width = rng.integers(34, 60, 2)
            y, x = np.mgrid[0:height, 0:width]
            angle = kind * np.pi / 3 + rng.normal(0, 0.15)
            wave = np.sin(rng.uniform(0.35, 0.5) * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
            pixels = (128 + 70 * wave)[..., None] * colour + rng.normal(0, 12, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.jpg")


def test_the_page_has_its_steps() -> None:
    kinds = [command.split()[1] for command in COMMANDS]
    assert kinds == ["show", "run", "run", "report", "report", "report", "compare", "verify", "export", "show"]


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    (card,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "birds.toml").write_text(card)
    make_pictures(tmp_path / "birds")
    programs = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    said = {}
    for command in COMMANDS:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        said[command] = done.stdout
    assert "finch, robin, wren" in said[COMMANDS[0]]
    rows = re.findall(r"^\| (none|lora) +\| ([\d.]+)%", said[COMMANDS[2]], re.MULTILINE)
    accuracy = {name: float(value) for name, value in rows}
    assert accuracy["lora"] > 70  # of three classes
    assert (tmp_path / "report.html").stat().st_size > 1e6 and "\\begin" in (tmp_path / "paper.tex").read_text()
    assert list((tmp_path / "figures").glob("*.svg"))
    assert len(list((tmp_path / "record").glob("birds-*/certificates.jsonl.gz"))) == 2
