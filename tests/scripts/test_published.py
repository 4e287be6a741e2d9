"""published.csv and its page: rows recomputed from the released logs, and our rows beside the published ones."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pandas as pd
import published
import pytest

from bench.errors import BenchError
from bench.report import published as reader
from tests.helpers.records import made_up

ROOT = Path(__file__).parents[2]
LOGS = Path(os.environ.get("CERTBENCH_SHARED") or ROOT.parent / "shared") / "reference" / "logs" / "catrs"
HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


def write_log(folder: Path, radii: list[str], name: str = "cifar10-macer-sigma0.5.tsv") -> Path:
    """Write a log; image i of class 1 has that radius, and is wrong at the last."""
    rows = [f"{i}\t1\t{int(i < len(radii) - 1)}\t{r}\t{int(i < len(radii) - 1)}\t0:00:01" for i, r in enumerate(radii)]
    (folder / name).write_text("\n".join([HEADER, *rows]))
    return folder / name


def test_the_rows_of_a_log_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Of four images, right at 1.91, .26 and .0, wrong at 1.0."""
    rows = published.recomputed(write_log(tmp_path, ["1.91", "0.26", "0.0", "1.0"]))
    accuracy = {float(r["radius"]): float(r["value"]) for r in rows if r["metric"] == "certified_accuracy"}
    assert accuracy == {0.0: 75, 0.25: 50, **dict.fromkeys([0.5, 0.75, 1.0, 1.25, 1.5, 1.75], 25)}
    (acr,) = (r for r in rows if r["metric"] == "acr")
    assert float(acr["value"]) == pytest.approx((1.91 + 0.26) / 4, abs=1e-4)
    assert {(r["inputs"], r["n"], r["alpha"]) for r in rows} == {("4", "100000 inferred", "0.001 inferred")}


@pytest.mark.parametrize("radius", ["1.90", "1.96", "1.6"])  # 1.96 is the largest at alpha .01, 1.6 at n 10,000
def test_a_log_of_another_n_or_alpha_is_refused(tmp_path: Path, radius: str) -> None:
    with pytest.raises(BenchError, match=r"its largest radius is .*, and 1.91 that of n 100000 and alpha 0.001"):
        published.recomputed(write_log(tmp_path, [radius, "0.1"]))


def test_an_update_replaces_the_recomputed_rows_alone(tmp_path: Path) -> None:
    file = tmp_path / "published.csv"
    file.write_text((ROOT / "reports" / "published.csv").read_text())
    write_log(tmp_path, ["1.91", "0.1"])
    published.main(["logs", str(tmp_path), "--file", str(file)])
    before, after = (list(csv.DictReader(f.open())) for f in (ROOT / "reports" / "published.csv", file))
    own = [r for r in before if (r["arxiv"], r["checked"]) == (published.ARXIV, published.CHECKED)]
    assert own and [r for r in after if r not in before] and not any(r in after for r in own)
    assert [r for r in before if r not in own] == [r for r in after if r in before]
    with pytest.raises(SystemExit, match="has no log named"):
        published.main(["logs", str(ROOT / "docs"), "--file", str(file)])


@pytest.mark.skipif(not LOGS.is_dir(), reason=f"no {LOGS}; set CERTBENCH_SHARED")
@pytest.mark.parametrize("name", ["cifar10-cat-rs-sigma0.25", "cifar10-salman-sigma0.5", "cifar10-macer-sigma1.0"])
def test_rows_of_the_file_are_those_of_the_released_logs(name: str) -> None:
    rows = published.recomputed(LOGS / f"{name}.tsv")
    facts = reader.facts().to_dict("records")
    assert len(rows) >= 5 and all(row in facts for row in rows)


def test_every_log_at_hand_has_its_rows() -> None:
    """Seven methods at three sigmas, but for SmoothMix at sigma 1.0, which was not released with them."""
    facts = reader.facts()
    facts = facts[(facts["arxiv"] == published.ARXIV) & (facts["metric"] == "acr")]
    methods = [m for m, _ in published.METHODS.values()]
    wanted = {(m, s) for m in methods for s in ("0.25", "0.5", "1.0")} - {("smoothmix", "1.0")}
    assert set(zip(facts["method"], facts["sigma"], strict=True)) == wanted


def test_our_rows_are_beside_the_published_ones(tmp_path: Path) -> None:
    made_up(tmp_path / "runs", [0.3] * 15 + [0.1] * 5, name="ours", dataset="cifar10")
    made_up(tmp_path / "runs", [0.3] * 20, name="validation", dataset="cifar10", split="validation")
    published.main(["page", str(tmp_path / "runs"), "--out", str(tmp_path / "with")])
    published.main(["page", "--out", str(tmp_path / "without")])
    text, without = ((tmp_path / d / "report.md").read_text() for d in ("with", "without"))
    (row,) = (line for line in text.splitlines() if line.startswith("| ours"))
    assert row.startswith("| ours: ours (vit) | 100.0 | 75.0 | 0.0 | ")
    assert "| 20 | 1000 | 0.001 | probabilistic at alpha | a record | " in row
    section = text[: text.index(row)].rpartition("### ")[2]
    assert section.startswith("CIFAR-10, sigma 0.25")
    (changed,) = (line for line in without.splitlines() if line not in text)
    assert changed.startswith("Made by") and "Bands" in text and "Bands" not in without
    assert "ours" in (tmp_path / "with" / "cifar10.svg").read_text()
    drawn = [(tmp_path / d / "imagenet.svg").read_bytes() for d in ("with", "without")]
    assert drawn[0] == drawn[1]


def test_the_page_has_every_certified_accuracy(tmp_path: Path) -> None:
    facts = reader.facts()
    text = (ROOT / "reports" / "published" / "report.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    counted = sum(bool(cell) and cell.replace(".", "").isdigit() and "." in cell for row in rows for cell in row[1:-6])
    wanted = facts[facts["metric"].isin(["certified_accuracy", "clean_accuracy"])]
    ours = sum(len([c for c in row[1:-6] if c]) for row in rows if row[0].startswith("| ours"))
    assert counted - ours == len(wanted)
    assert pd.to_numeric(wanted["value"]).notna().all()
