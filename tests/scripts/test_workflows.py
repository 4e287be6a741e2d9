"""The workflows in .github parse, accept the inputs in docs/gate.md, and let no input become shell text."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(text: str) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(text)
    return {"on" if key is True else key: value for key, value in found.items()}  # YAML 1.1 reads "on" as true


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_nothing_is_interpolated_into_a_shell_and_actions_are_pinned(file: Path) -> None:
    workflow = load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    found = steps(workflow)
    assert found
    for step in found:
        assert "${{" not in step.get("run", "")
        assert "uses" not in step or re.fullmatch(r"[\w/.-]+@[0-9a-f]{40}", step["uses"])
        for name in step.get("env", {}):
            assert f'"${name}"' in step["run"]  # quoted where it is used


@pytest.mark.parametrize(("name", "page"), [("gate", "gate.md"), ("verify", "publish.md")])
def test_the_documentation_calls_the_workflow_with_its_inputs(name: str, page: str) -> None:
    file = ROOT / ".github" / "workflows" / f"{name}.yml"
    gate = load(file.read_text())
    inputs = gate["on"]["workflow_call"]["inputs"]
    blocks = re.findall(r"```yaml\n(name: .*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    (call,) = (job for block in blocks for job in load(block)["jobs"].values() if "uses" in job)
    assert call["uses"].endswith(f"/.github/workflows/{name}.yml@COMMIT")
    assert {k for k, v in inputs.items() if v.get("required")} <= set(call["with"]) <= set(inputs)
    used = set(re.findall(r"inputs\.(\w+)", file.read_text()))
    assert used == set(inputs)


def test_the_gates_steps_pass_words_and_expand_nothing(tmp_path: Path) -> None:
    """Run the steps with bash and a ``bench`` that prints its arguments."""
    gate = load((ROOT / ".github" / "workflows" / "gate.yml").read_text())
    fake = tmp_path / "bench"
    fake.write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RUNNER_TEMP": "/t m p", "BASELINE": "a b;exit.json", "CHECK": ""}
    env["RUN"] = "--defense './my $(touch gone).py' --set\n a=*;touch --seed \"0,1\""
    said = [
        subprocess.run(
            ["bash", "-eo", "pipefail", "-c", s["run"]], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        for s in steps(gate)
        if "xargs" in s.get("run", "")
    ]
    assert [s.returncode for s in said] == [0, 0]
    assert said[0].stdout == (
        "[run][--out][/t m p/gate-runs][--defense][./my $(touch gone).py][--set][a=*;touch][--seed][0,1]"
    )
    assert said[1].stdout == "[check][/t m p/gate-runs][--baseline][a b;exit.json]"
    assert {f.name for f in tmp_path.iterdir()} == {"bench"}
