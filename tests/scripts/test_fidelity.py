"""docs/fidelity.md is what the code and the list of published values give."""

from __future__ import annotations

import re

import fidelity
import pytest

from bench import plugins
from defenses.retrain import Retrain

ROWS = [(name, row) for name, (_, rows) in fidelity.sections().items() for row in rows]


def test_the_page_is_up_to_date() -> None:
    assert fidelity.PAGE.read_text() == fidelity.page(), "run make fidelity, and read what has changed"


def test_every_defense_has_a_table() -> None:
    assert sorted(fidelity.sections()) == sorted([*plugins.names(), "certification", "objectives"])


def test_every_test_that_the_page_names_exists() -> None:
    named = {row.test for _, row in ROWS if row.test}
    assert len(named) > 10
    for one in named:
        file, _, function = one.partition("::")
        assert f"def {function}(" in (fidelity.ROOT / file).read_text(), one


def test_numbers_of_ours_come_from_the_code() -> None:
    for name, row in ROWS:
        text = row.ours.replace("CIFAR-10", "")
        assert "{" in text or not re.search(r"\d", text), (name, row.what)


def test_a_value_that_changes_without_a_reason_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"paper": Retrain.presets["paper"] | {"lr": 0.2}}
    monkeypatch.setattr(Retrain, "presets", changed)
    with pytest.raises(fidelity.Failed, match=r"retrain: optimizer: .*rate 0\.2.* here, .*rate 0\.1.* there: say why"):
        fidelity.page()


VALUES = {"rate": 0.1}


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (fidelity.Row("a", "0.1", "x.py", "{rate:g}", why="unused"), ["a", "0.1 (x.py)", "0.1", "same"]),
        (fidelity.Row("a", "0.2", "", "{rate:g}", why="smaller"), ["a", "0.2", "0.1", "differs: smaller"]),
        (fidelity.Row("a", "not stated", "", "{rate:g}", why="usual"), ["a", "not stated", "0.1", "chosen: usual"]),
        (fidelity.Row("a", "b", test="t.py::test_a"), ["a", "b", "as released", "same ([test_a](../t.py))"]),
    ],
)
def test_a_row_says_what_differs_and_why(row: fidelity.Row, cells: list[str]) -> None:
    assert row.cells(VALUES) == cells


@pytest.mark.parametrize("row", [fidelity.Row("a", "0.2", "", "{rate:g}"), fidelity.Row("a", "b")])
def test_a_row_without_a_reason_or_a_test_is_refused(row: fidelity.Row) -> None:
    with pytest.raises(fidelity.Failed):
        row.cells(VALUES)
