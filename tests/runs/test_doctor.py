"""Findings of ``bench doctor``: what passed, what could not be done, and how to fix it."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.commands import TINY, Bench, defense

FAILS_TO_TRAIN = """
from torch import nn
from bench.interface import Defense, Schedule

class Mine(Defense):
    class Config(Schedule): ...

    def build(self):
        self.scale = nn.Linear(1, 1)

    def fit(self, job):
        raise RuntimeError("no data")

    def logits(self, x, draw):
        return self.context.base(x)
"""


def test_a_defense_that_cannot_be_trained(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILS_TO_TRAIN)
    result = bench("doctor", tmp_path / "mine.py", "--dataset", TINY)
    assert result.code == 1
    ok, failed, why = result.out.splitlines()
    assert ok == "ok:   is built, and asks the base for no more than its access"
    assert failed == "FAIL: could not train for 3 steps"
    assert "RuntimeError: no data" in why


def test_a_defense_that_raises_in_logits(bench: Bench) -> None:
    result = bench("doctor", defense("raises"), "--dataset", TINY)
    assert result.code == 1
    assert "FAIL: could not show that its logits depend on each image and its draw alone" in result.out
    assert "RuntimeError: out of ideas" in result.out
