"""docs/notebook.ipynb, its code cells run in order in one namespace and its last expressions shown as Jupyter would."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from bench.runs.prediction import Prediction

DOCS = Path(__file__).parents[2] / "docs"


def code_cells() -> list[str]:
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def execute(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell; return the value of its last line if that is an expression."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_notebook_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    baselines = tmp_path / "reports" / "baselines"
    baselines.mkdir(parents=True)
    shutil.copy(DOCS.parent / "reports" / "baselines" / "digits-vit.safetensors", baselines)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names: dict[str, Any] = {}
    shown = [value for value in (execute(cell, names) for cell in code_cells()) if value is not None]
    assert [len(value) for value in shown[:3]] == [2, 2, 2]  # runs, results, rows of the table
    assert "certified" in shown[1]._repr_html_()
    assert [line.get_label() for line in shown[3].lines] == names["frame"]["defense"].tolist()
    assert list(shown[4].columns) == ["lora", "none"] and len(shown[4]) == 5
    assert "against run 2" in shown[5]._repr_markdown_()
    assert isinstance(shown[6], Prediction) and shown[6].n == 1000
    assert len(shown) == 7


def test_the_notebook_is_kept_without_outputs_and_paths_of_a_machine() -> None:
    found = json.loads((DOCS / "notebook.ipynb").read_text())
    assert found["nbformat"] == 4
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in found["cells"] if "outputs" in cell)
