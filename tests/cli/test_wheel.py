"""The installed wheel and sdist, each in its own environment outside of a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import TESTS, TINY

ROOT = TESTS.parent
Installed = Callable[..., subprocess.CompletedProcess[str]]


def command(cwd: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """Run in ``cwd``, without this process's import path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP"))} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True)


def checked(cwd: Path, *args: object) -> str:
    done = command(cwd, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["wheel", pytest.param("sdist", marks=pytest.mark.slow)])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The program ``bench`` of a fresh environment, called in an empty folder.

    Dependencies are this environment's, seen through a .pth file, so nothing is downloaded. An editable install is
    not seen so, since its own .pth is read only in a site folder.
    """
    top = tmp_path_factory.mktemp(request.param)
    checked(ROOT, sys.executable, "-m", "hatchling", "build", "-d", top / "dist", "-t", request.param)
    (built,) = (top / "dist").iterdir()
    checked(top, sys.executable, "-m", "venv", "--without-pip", top / "env")
    python = top / "env" / "bin" / "python"
    site = Path(checked(top, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    seen = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(seen))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    checked(top, *pip, "--no-build-isolation", "--ignore-installed", built)
    code = "import bench, defenses; print(bench.__file__, defenses.__file__)"
    assert all(Path(file).is_relative_to(site) for file in checked(top, python, "-c", code).split())
    (work := top / "work").mkdir()
    return lambda *args: command(work, top / "env" / "bin" / "bench", *args)


def test_the_cards_are_installed_with_the_package(installed: Installed) -> None:
    listed = installed("list", "datasets", "--json")
    assert listed.returncode == 0, listed.stderr
    assert {row["name"] for row in json.loads(listed.stdout)} == {f.stem for f in (ROOT / "datasets").glob("*.toml")}
    bases = installed("list", "bases", "--json")
    assert {row["dataset"] for row in json.loads(bases.stdout)} >= {"digits", "cifar10"}
    # The card is found by its name, so the error is about the preset.
    refused = installed("run", "--defense", "none", "--dataset", "digits", "--preset", "no-such-preset")
    assert refused.returncode == 2 and "unknown preset of digits" in refused.stderr


@pytest.mark.slow
def test_run_report_and_check_work_outside_of_the_checkout(installed: Installed, tmp_path: Path) -> None:
    weights = ROOT / "reports" / "baselines" / "digits-vit.safetensors"
    runs, baseline = tmp_path / "runs", tmp_path / "baseline.json"
    args = ("--examples", 4, "--n0", 10, "--n", 50, "--out", runs)
    ran = installed("run", "--defense", "none", "--dataset", "digits", "--base", weights, *args)
    assert ran.returncode == 0, ran.stderr
    tiny = shutil.copy(TINY, tmp_path)
    ran = installed("run", "--defense", "lora", "--dataset", tiny, *args, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[0]["environment"]["commit"] is None
    assert installed("list", "runs", "--out", runs).stdout.count("4/4") == 2
    written = installed("report", runs, "--out", tmp_path / "report")
    assert written.returncode == 0, written.stderr
    assert len(list((tmp_path / "report").glob("digits-s0.25-*.svg"))) == 2
    page = installed("report", runs, "--format", "html", "--out", tmp_path / "page.html")
    assert page.returncode == 0, page.stderr
    published = installed("report", runs, "--published")
    assert published.returncode == 0, published.stderr
    only = next(runs.glob("digits-none-*"))
    assert installed("check", only, "--baseline", baseline, "--update").returncode == 0
    passed = installed("check", only, "--baseline", baseline)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    verified = installed("verify", only)
    assert verified.returncode == 0, verified.stdout + verified.stderr
