"""The conformance test accepts every built-in defense, and rejects unsound ones."""

from __future__ import annotations

import pytest

from bench import plugins
from bench.options import RunOptions
from bench.records.findings import Finding
from bench.runs.doctor import examine
from bench.runs.plan import Plan, make_plans
from tests.helpers.commands import TINY, defense


def plan(name: str, *settings: str) -> Plan:
    (found,) = make_plans(RunOptions(defenses=name, dataset=TINY, settings=settings))
    return found


def findings(name: str) -> list[Finding]:
    return list(examine(plan(name)))


@pytest.mark.parametrize("name", plugins.names())
def test_every_registered_defense_conforms(name: str) -> None:
    found = findings(name)
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


def test_parallel_adapters_conform() -> None:
    found = list(examine(plan("adapter", "parallel=0.1")))
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


@pytest.mark.parametrize("name", ["half_space", "randomised"])
def test_sound_plugins_conform(name: str) -> None:
    assert [f for f in findings(defense(name)) if f.problem] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch_average", "other rows of its batch"),
        ("unseeded", "take all randomness from draw"),
        ("raises", "RuntimeError: out of ideas"),
        ("wrong_shape", "float tensor of shape"),
        ("greedy", "QUERY access and copies the base"),
        ("hidden_state", "parameters or buffers"),
    ],
)
def test_unsound_plugins_are_caught(name: str, words: str) -> None:
    last = findings(defense(name))[-1]
    assert words in last.problem
    assert "\n" not in last.problem
