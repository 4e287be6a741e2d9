"""Every table and figure of reports/ that has records is what its records give today."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import remake_reports
from numpy.typing import NDArray
from safetensors.torch import load_file

from bench.io.files import file_sha256
from bench.models.base import local_sha256
from bench.records.record import read_run

ROOT = Path(__file__).parents[2]
# Made by scripts from other inputs.
NO_RECORDS = {"baselines", "savings", "soak"}
_PATH = re.compile(r'<path (?:id="[^"]*" )?d="([^"]+)"')
_USE = re.compile(r'<use xlink:href="[^"]*" x="([^"]+)" y="([^"]+)"')
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def drawn(svg: str) -> list[NDArray[np.float64]]:
    """Return the coordinates of the lines, bands and markers of a figure, relative to the frames of their axes."""
    found = []
    for axes in re.split(r'<g id="axes_\d+">', svg)[1:]:
        shapes = [d for d in _PATH.findall(axes.partition('<g id="legend')[0]) if not set("CQ") & set(d)]  # no glyphs
        frame, *paths = [np.array([float(x) for x in _NUMBER.findall(d)]).reshape(-1, 2) for d in shapes]
        marks = np.array([[float(x) for x in place] for place in _USE.findall(axes)]).reshape(-1, 2)
        found += [(path - frame.min(0)) / np.ptp(frame, 0) for path in (*paths, marks)]
    return found


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of reports/ that has records, made again."""
    out = tmp_path_factory.mktemp("reports")
    assert len(remake_reports.remake(ROOT / "reports", out)) >= 6
    return out


def test_tables_are_those_of_the_records(remade: Path) -> None:
    files = sorted(f.relative_to(remade) for f in remade.glob("*/*.md"))
    assert {f.parent.name for f in files} == {s.name for s in remake_reports.studies(ROOT / "reports")} | {
        "published",
        "leaderboard",
    }
    for file in files:
        assert (ROOT / "reports" / file).read_bytes() == (remade / file).read_bytes(), f"{file}: run make reports"


def test_figures_draw_the_records(remade: Path) -> None:
    files = sorted(f.relative_to(remade) for f in remade.glob("*/*.svg"))
    assert len(files) >= 4
    for file in files:
        then, now = (drawn((root / file).read_text()) for root in (ROOT / "reports", remade))
        assert now and len(then) == len(now), f"{file}: run make reports"
        for a, b in zip(then, now, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3, err_msg=f"{file}: run make reports")


def test_a_figure_of_other_data_differs(remade: Path) -> None:
    """The comparison sees a curve that is moved by one point of accuracy."""
    (file,) = [f for f in remade.glob("digits-quick/*.svg") if "cost" not in f.name]
    text = file.read_text()
    curve = max(_PATH.findall(text), key=len)
    point = curve.split()[-2 if curve.strip().endswith("z") else -1]
    moved = text.replace(curve, curve.replace(f" {point}", f" {float(point) + 1.5:.6f}"))
    assert len(drawn(text)) == len(drawn(moved)) and any(len(path) > 100 for path in drawn(text))
    differ = [not np.allclose(a, b, atol=2e-3) for a, b in zip(drawn(text), drawn(moved), strict=True)]
    assert sum(differ) == 1


def test_the_front_page_is_that_of_the_report(remade: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    report = (remade / remake_reports.FRONT / "report.md").read_text()
    assert remake_reports.front_page(readme, report) == readme, "run make reports"
    assert len(readme.splitlines()) < 150
    assert readme.partition("<!-- end -->")[0].count("\n| defense ") == 1  # the report has a table for each sigma
    (figure,) = re.findall(r"!\[[^]]*\]\((reports/[^)]*)\)", readme)
    assert (ROOT / figure).exists()


def test_what_is_in_reports_is_remade_or_listed(remade: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "reports"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    made = {str(f.relative_to(remade)) for f in remade.rglob("*") if f.is_file()}
    for name in (line.removeprefix("reports/") for line in tracked.stdout.splitlines()):
        folder, _, rest = name.partition("/")
        inputs = (
            name == "published.csv" or rest.startswith(("runs/", "weights/")) or rest in ("study.toml", "verified.json")
        )
        assert inputs or name in made or folder in NO_RECORDS, f"reports/{name} has no record"


def test_records_in_the_repository_are_small_and_hold_no_path() -> None:
    for file in ROOT.glob("reports/*/runs/*/*"):
        assert file.name in ("run.json", "certificates.jsonl.gz", "attacks.jsonl.gz"), (
            f"{file}: write it with bench export --record"
        )
        assert file.stat().st_size < 2 * 2**20
        if file.name == "run.json":
            assert not re.search(r'"(?:[^"]*[ =,])?(?:/|~/|[A-Z]:\\\\)\w', file.read_text()), file


def test_weights_in_the_repository_are_small_and_those_of_records() -> None:
    metas = sorted(ROOT.glob("reports/*/weights/*/meta.json"))
    assert metas
    for meta in metas:
        records = [read_run(f.parent) for f in meta.parents[2].glob("runs/*/run.json")]
        found, file = json.loads(meta.read_text()), meta.with_name("weights.safetensors")
        assert file_sha256(file) == found["sha256"]
        if "-base-" in meta.parent.name:
            first, *others = (r.identity.as_json()["base"] for r in records)
            architecture = {k: v for k, v in first.items() if k not in ("name", "sha256")}
            assert local_sha256(load_file(file), architecture) == first["sha256"]
            assert all(base == first for base in others)
            assert file.stat().st_size < 3 * 2**20
        else:
            assert any(found["sha256"] in r.identity.defense.trained for r in records)
            assert file.stat().st_size < 2 * 2**20
