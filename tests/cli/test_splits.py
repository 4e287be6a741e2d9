"""``bench run --split``: named test parts, corruptions and training images, from the command to the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.data.datasets import load_card, load_split
from bench.records.record import Record, read_run
from tests.helpers import shifted
from tests.helpers.commands import TINY, Result
from tests.helpers.madeup import png

Bench = Callable[..., Result]
SMALL = ("--n0", "5", "--n", "40", "--alpha", ".01", "--examples", "6")
CARD = """
name = "photos"
shape = [3, 8, 8]
classes = ["a", "b"]
radii = [0.0, 0.1]
splits = {{ validation = 2 }}
presets.quick = {{ examples = 10, n0 = 5, n = 40 }}
{more}
[source]
reader = "folder"
folder = "photos"
test = "test"

[bases.vit]
model = "vit_tiny_patch16_224"
args = {{ img_size = 8, patch_size = 4, embed_dim = 8, depth = 1, num_heads = 1 }}
schedule = {{ epochs = 1, batch = 8 }}
"""
CORRUPTIONS = 'corruptions = { names = ["fog"], folder = "photos-c" }'


def photos(root: Path, more: str = CORRUPTIONS) -> Path:
    """Write a card with ten training and ten test pictures, and a corruption of the latter; return its file."""
    for part in ("train", "test"):
        for name in "ab":
            (root / "photos" / part / name).mkdir(parents=True)
            for i in range(5):
                (root / "photos" / part / name / f"{i}.png").write_bytes(png())
    shifted.corrupted(root / "photos-c", side=8)
    np.save(root / "photos-c" / "labels.npy", np.tile(np.arange(10) % 2, 5))
    (root / "photos.toml").write_text(CARD.format(more=more))
    return root / "photos.toml"


def run(bench: Bench, *words: object) -> Record:
    """Do one run; return its record."""
    done = bench("run", *words, "--json")
    assert done.code == 0, done.err
    (made,) = json.loads(done.out)
    return read_run(Path(made["path"]))


@pytest.fixture
def wilds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    monkeypatch.setenv("CERTBENCH_DATA", str(tmp_path / "wilds"))
    return shifted.camelyon(tmp_path / "wilds", each=2)


def test_camelyon17_in_and_out_of_distribution(
    bench: Bench, tmp_path: Path, wilds: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    words = ("--defense", "none", "--dataset", "camelyon17", "--sigma", ".5", *SMALL, "--out", out)
    refused = bench("run", *words)
    assert refused.code == 2
    assert "camelyon17 has no split test; name one of its test parts: --split test-id, test-ood" in refused.err
    assert "did you mean test-ood or test-id?" in bench("run", *words, "--split", "test-odd").err
    found = {split: run(bench, *words, "--split", split) for split in ("test-ood", "test-id")}
    for split, record in found.items():
        identity, data = record.identity, record.info.data
        assert identity.split == split and identity.dataset == "camelyon17"
        assert data[split].startswith("$CERTBENCH_DATA/camelyon17_v1.0/metadata.csv: center")
        rows = [r for r in wilds if (r[7] == 2 if split == "test-ood" else r[7] in (0, 3, 4) and r[8] == 1)]
        assert [rows[c.index][5] for c in record.certificates] == [c.label for c in record.certificates]
        certified = [str(rows[i][7]) for i in identity.indices]
        assert data["domains"]["certified"] == {center: certified.count(center) for center in set(certified)}
        assert data["domains"]["trained_on"] == {"0": 4, "3": 4, "4": 4}
        assert sum(c.label for c in record.certificates) == 3  # of 6, as balanced as possible
    assert found["test-ood"].identity.images != found["test-id"].identity.images
    assert found["test-ood"].identity.base == found["test-id"].identity.base  # trained once
    checked = bench("verify", found["test-ood"].path)
    assert checked.code == 0 and "images drawn again from the seed give the recorded counts" in checked.out
    report = " ".join(bench("report", out).out.split())
    assert "### camelyon17, sigma 0.5: 6 test-id images" in report
    assert "### camelyon17, sigma 0.5: 6 test-ood images" in report
    assert "### Splits compared: camelyon17, sigma 0.5: n0 5, n 40, alpha 0.01" in report
    apart = bench("compare", *(r.path for r in found.values()))
    assert apart.code == 3 and "split" in apart.err


def test_a_corruption_shares_everything_that_is_trained(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = ("--defense", "full", "--dataset", photos(tmp_path), "--sigma", ".5", *SMALL, "--out", out)
    clean = run(bench, *words)
    fog = run(bench, *words, "--split", "test-fog-3")
    assert fog.identity.split == "test-fog-3" and fog.identity.card == clean.identity.card
    for part in ("base", "defense", "sigma", "noise", "sampling"):
        assert getattr(fog.identity, part) == getattr(clean.identity, part)
    assert fog.cost.train_seconds == clean.cost.train_seconds  # read from the cache
    assert fog.info.data["train"] == clean.info.data["train"]
    assert fog.info.data["test-fog-3"] == "photos-c/fog.npy, severity 3 of 5, rows 20 to 29"
    assert "domains" not in fog.info.data
    split = load_split(load_card(str(tmp_path / "photos.toml")), "test-fog-3")
    assert fog.identity.images == split.sha256(fog.identity.indices)
    assert bench("verify", fog.path, "--deep").code == 0
    again = bench("run", *words, "--split", "test-fog-3")
    assert "already complete, nothing to do" in again.out + again.err
    # Another severity is other images, and other noise.
    other = run(bench, *words, "--split", "test-fog-4")
    assert other.path != fog.path and other.identity.images != fog.identity.images
    compared = json.loads(bench("report", out, "--format", "json").out)["splits_compared"]
    assert [(c["reference"], list(c["images"])) for c in compared] == [("test", ["test", "test-fog-3", "test-fog-4"])]


def test_a_card_with_corruptions_has_the_identity_of_the_card_without(bench: Bench, tmp_path: Path) -> None:
    words = ("--defense", "full", "--sigma", ".5", *SMALL, "--out", tmp_path / "runs", "--dataset")
    card = photos(tmp_path, more="")
    before = run(bench, *words, card)
    card.write_text(CARD.format(more=CORRUPTIONS))
    after = run(bench, *words, card)
    assert after.path == before.path and after.identity == before.identity
    assert after.info.environment == before.info.environment  # the same record, which was not made again


def test_training_images_are_certified_apart(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = ("--defense", "full", "--dataset", TINY, *SMALL, "--out", out)
    test = run(bench, *words)
    train = run(bench, *words, "--split", "train")
    assert train.identity.split == "train" and train.identity.defense == test.identity.defense
    assert max(train.identity.indices) < 200  # the preset trains on 200 of 1,497 images
    labels = [c.label for c in train.certificates]
    assert len(set(labels)) == len(labels) == 6  # balanced
    split = load_split(load_card(TINY), "train")
    assert train.identity.images == split.sha256(train.identity.indices)
    assert bench("verify", train.path, "--deep", "--fresh").code == 0
    report = bench("report", out).out
    assert report.count("\n### ") == 2 and "Splits compared" not in report
    assert "These are images of the training split, to measure overfitting: not a result." in " ".join(report.split())
    assert bench("compare", test.path, train.path).code == 3
    dry = bench("run", *words, "--split", "train", "--dry-run")
    assert dry.code == 0
    too_many = bench("run", *words, "--split", "train", "--examples", "201")
    assert too_many.code == 2 and "must be 1 to 200 (the train split's size)" in too_many.err


def test_a_study_certifies_several_splits(bench: Bench, tmp_path: Path) -> None:
    card, study = photos(tmp_path), tmp_path / "shift.toml"
    runs = "".join(f'[[run]]\nsplit = "{s}"\n' for s in ("test", "test-fog-1", "test-fog-5", "train", "validation"))
    study.write_text(f'defense = "none"\ndataset = "{card}"\nsigma = 0.5\nn0 = 5\nn = 40\nalpha = 0.01\n{runs}')
    done = bench("run", study, "--out", tmp_path / "runs")
    assert done.code == 0, done.err
    records = [read_run(p.parent) for p in (tmp_path / "runs").glob("*/run.json")]
    assert sorted(r.identity.split for r in records) == ["test", "test-fog-1", "test-fog-5", "train", "validation"]
    sizes = {r.identity.split: len(r.certificates) for r in records}  # at most the preset's 10
    assert sizes == {"test": 10, "test-fog-1": 10, "test-fog-5": 10, "train": 8, "validation": 2}


def test_named_parts_of_folders(bench: Bench, tmp_path: Path) -> None:
    card = photos(tmp_path, more="")
    text = card.read_text().replace('test = "test"', 'test = "test"\nparts = { test-grey = "grey" }')
    card.write_text(text)
    for name in "ab":
        (tmp_path / "photos" / "grey" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "photos" / "grey" / name / f"{i}.png")
    words = ("--defense", "none", "--dataset", card, "--sigma", ".5", *SMALL, "--out", tmp_path / "runs")
    record = run(bench, *words, "--split", "test-grey")
    assert record.info.data["test-grey"] == "photos/grey" and len(record.certificates) == 6


def test_a_log_keeps_its_split(bench: Bench, tmp_path: Path) -> None:
    words = ("--defense", "none", "--dataset", photos(tmp_path), "--sigma", ".5", *SMALL, "--out", tmp_path / "runs")
    for split in ("test-fog-2", "train"):
        record = run(bench, *words, "--split", split)
        log = tmp_path / f"{split}.tsv"
        assert bench("export", record.path, "--out", log).code == 0
        done = bench("import", log, "--dataset", "photos", "--out", tmp_path / "imported", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["identity"]["split"] == split


def test_the_list_of_data_sets_names_their_splits(bench: Bench) -> None:
    rows = {row["name"]: row["splits"] for row in json.loads(bench("list", "datasets", "--json").out)}
    assert rows["camelyon17"] == rows["iwildcam"] == "train, validation, test-id, test-ood"
    assert rows["cifar10"] == "train, validation, test, test-CORRUPTION-1 to -5 (19 corruptions)"
    assert rows["digits"] == "train, validation, test"


def test_doctor_and_show_need_no_test_split(bench: Bench, wilds: list[list[Any]]) -> None:
    done = bench("doctor", "none", "--dataset", "camelyon17")
    assert done.code == 0, done.out + done.err
    done = bench("show", "none", "--dataset", "camelyon17")
    assert done.code == 0, done.err
    card = bench("show", "camelyon17").out
    assert "splits: train, validation, test-id, test-ood\n" in card
    assert "parts (test-id (center 0 3 4; split 1); test-ood (center 2))" in card
