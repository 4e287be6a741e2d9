"""The project's own files agree with each other: versions, bounds of dependencies, what CI runs."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from bench import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_changelog_and_citation_name_the_version() -> None:
    headings = re.findall(r"^## \[.*", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert __version__ in headings[0]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_every_dependency_has_a_lower_bound_that_was_tried() -> None:
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    tried = {name: Version(version) for name, _, version in (line.partition("==") for line in lines) if version}
    needed = [Requirement(d) for d in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["ray"]]
    for one in needed:
        (bound,) = one.specifier
        assert bound.operator == ">=" and Version(bound.version) == tried[one.name], one
    assert len(PROJECT["dependencies"]) > 20


def test_every_job_runs_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for file in ("ci.yml", "weekly.yml"):
        for job in yaml.safe_load((ROOT / ".github" / "workflows" / file).read_text())["jobs"].values():
            (command,) = (step["run"] for step in job["steps"] if "run" in step)
            words = command.removeprefix("make ").split()
            called |= {w for w in words if "=" not in w} - {'"$TARGET"'}
            called |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
    assert {"lint", "type", "suite", "docs", "gate", "slow", "fuzz", "oldest", "perf-ratio"} == called <= targets


def test_the_demo_installs_no_tools_of_developers() -> None:
    """What make would run for the demo in a new checkout."""
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installs = [line for line in planned.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 1 and installs[0].endswith("--editable .")
