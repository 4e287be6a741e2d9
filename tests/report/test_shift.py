"""Test parts of a data set compared: what is in such a table, its numbers, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.records import metrics, unpaired
from bench.records.paired import holm
from bench.records.record import read_run
from bench.report import output, shift, tables, terminal, text
from bench.report.shift import Shift
from bench.smoothing import bounds
from tests.helpers.commands import Result
from tests.helpers.records import made_up

Bench = Callable[..., Result]
ID, OOD = [0.5] * 60 + [0.3] * 20 + [None] * 20, [0.3] * 12 + [None] * 28


def part(root: Path, split: str, radii: list[float | None] = OOD, name: str = "lora", **changes: Any) -> Path:
    return made_up(root, radii, name=name, **{"split": split, "images": split[-1] * 64, **changes})


def found(root: Path) -> list[Shift]:
    records, left_out = tables.load_records(root)
    assert not left_out
    return shift.find(records)


def test_each_number_is_that_of_its_own_images(tmp_path: Path) -> None:
    runs = {"test-id": read_run(part(tmp_path, "test-id", ID)), "test-ood": read_run(part(tmp_path, "test-ood"))}
    (made,) = found(tmp_path)
    assert made.reference == "test-id" and made.images == {"test-id": 100, "test-ood": 40}
    assert made.radii == [0.0, 0.25, 0.5] and made.tests == 3 and made.left_out == []
    (row,) = made.rows
    counts = {"test-id": [80, 80, 60], "test-ood": [12, 12, 0]}
    adjusted = holm([unpaired.fisher(a, 100, b, 40) for a, b in zip(*counts.values(), strict=True)])
    for split, record in runs.items():
        shares = metrics.summarise(record.certificates, made.radii).certified_accuracy
        for at, (radius, share) in enumerate(zip(made.radii, shares, strict=True)):
            cell = row.at(split, radius)
            assert cell is not None
            count, images = counts[split][at], made.images[split]
            assert (cell.value, cell.low, cell.high) == (share.value, share.low, share.high)
            assert (cell.value, (cell.low, cell.high)) == (count / images, bounds.interval(count, images))
            if split == "test-id":
                assert cell.difference is None
                continue
            assert cell.difference is not None
            assert cell.difference.value == pytest.approx(count / 40 - counts["test-id"][at] / 100)
            limits = unpaired.difference_interval(counts["test-id"][at], 100, count, 40)
            assert (cell.difference.low, cell.difference.high) == limits
            assert cell.difference.p == pytest.approx(adjusted[at])
            assert cell.difference.significant


def test_seeds_are_pooled_and_must_be_the_same(tmp_path: Path) -> None:
    for seed, weights in enumerate("ab"):
        for split in ("test", "test-ood"):
            run = part(tmp_path, split, seed=seed, defense=defense(weights=weights * 64))
            assert run.exists()
    (made,) = found(tmp_path)
    assert made.reference == "test" and [row.label for row in made.rows] == ["lora (2 seeds)"]
    part(tmp_path, "test-fog-1", seed=0, defense=defense(weights="a" * 64))  # the other seed is missing
    (made,) = found(tmp_path)
    assert list(made.images) == ["test", "test-ood"]
    assert made.left_out == ["lora (2 seeds) on test-fog-1 is left out: its seeds or weights are not those on test."]


def defense(name: str = "lora", **changes: Any) -> dict[str, Any]:
    kept = {"name": name, "source": "d" * 64, "config": {"rank": 4}, "weights": "e" * 64, "parts": {}}
    return {**kept, "objective": "gaussian", **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma": 0.5, "train_sigma": 0.5},
        {"base": {"name": "vit", "sha256": "a" * 64}},
        {"noise": {"kind": "float", "version": 1, "tau": 0.0}},
        {"procedure": {"kind": "fixed", "n0": 100, "n": 2000, "alpha": 0.001, "target": "selected"}},
        {"procedure": {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.01, "target": "selected"}},
        {"dataset": "others"},
        {"defense": defense(config={"rank": 8})},
        {"train_sigma": 0.5},
    ],
    ids=str,
)
def test_other_terms_are_not_compared(tmp_path: Path, changes: dict[str, Any]) -> None:
    part(tmp_path, "test-id")
    part(tmp_path, "test-ood", **changes)
    assert found(tmp_path) == []
    part(tmp_path, "test-ood")
    assert len(found(tmp_path)) == 1


def test_other_weights_are_not_the_same_defense(tmp_path: Path) -> None:
    part(tmp_path, "test-id")
    part(tmp_path, "test-ood", defense=defense(weights="f" * 64))
    assert found(tmp_path) == []


def test_training_and_validation_images_are_in_no_such_table(tmp_path: Path) -> None:
    for split in ("train", "validation", "test-ood"):
        part(tmp_path, split)
    assert found(tmp_path) == []
    part(tmp_path, "test")
    (made,) = found(tmp_path)
    assert list(made.images) == ["test", "test-ood"]


def test_of_two_sets_of_images_the_larger_is_taken(tmp_path: Path) -> None:
    part(tmp_path, "test-id", ID)
    part(tmp_path, "test-id", ID[:50])
    part(tmp_path, "test-ood")
    (made,) = found(tmp_path)
    assert made.images["test-id"] == 100
    assert made.left_out == ["Runs on 2 sets of test-id images: those on the largest are compared."]
    assert made.left_out[0] in made.note


def test_every_format_has_the_comparison_and_no_table_mixes_splits(bench: Bench, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    splits = ["test", *(f"test-fog-{i}" for i in range(1, 6)), "train", "validation"]
    for split in splits:
        part(runs, split, ID if split == "test" else OOD)
    report = tables.build(tables.load_records(runs)[0])
    assert [t.setting.split for t in report.tables] == [*splits[:6], "validation", "train"]
    assert [len(t.methods) for t in report.tables] == [1] * 8
    printed, markdown = terminal.render(report), text.render(report, "md")
    assert max(map(len, printed.splitlines())) <= 100
    for made in (printed, markdown):
        words = " ".join(made.split())
        assert "Splits compared: digits, sigma 0.25: n0 100, n 1,000, alpha 0.001" in words
        assert "Fisher's exact test (5% level, Holm's correction over all 15 differences)" in words
        assert "These are images of the training split, to measure overfitting: not a result." in words
        assert "These are validation images, for choosing settings: not a result." in words
        for split in splits:
            assert f" {split} images, n0 100" in words
    assert markdown.count("-50.0 *<br><sub>-63.7 to -32.2</sub>") == 10  # at two radii
    assert "-63.7 to -32.2" in printed  # on one line
    assert text.render(report, "latex").count("{30.0*}{[16.6, 46.5]}") == 10  # two radii, five severities
    data = json.loads(text.render(report, "json"))["splits_compared"]
    assert data[0]["images"] == {"test": 100} | {f"test-fog-{i}": 40 for i in range(1, 6)}
    assert "[train]" not in json.dumps(data)
    csv = text.render(report, "csv").splitlines()
    at = csv[0].split(",").index("split")
    assert [line.split(",")[at] for line in csv[1:]] == [t.setting.split for t in report.tables]
    page = bench("report", runs, "--out", tmp_path / "page.html")
    assert page.code == 0
    html = (tmp_path / "page.html").read_text()
    assert html.count("Splits compared: digits") == 1 and "digits, test-fog-3 images" in html
    assert {output.figure_name(t.setting).rpartition("-s0")[0] for t in report.tables} == {
        f"digits-{split}".removesuffix("-test") for split in splits
    }
