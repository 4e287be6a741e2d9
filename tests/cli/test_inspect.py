"""bench inspect: a page and data of a ViT's and a convnet's runs, the same at every call; what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.helpers import logs
from tests.helpers.commands import TINY, Bench, defense
from tests.helpers.diffusion_models import saved

pytest.importorskip("pytorch_grad_cam", reason="pip install 'certbench[inspect]'")
CONVNET = """
[bases.conv]
model = "resnet110"
args = { in_chans = 1, blocks = 1 }
schedule = { epochs = 5, batch = 32, lr = 4e-3 }
"""
FILES = ("inspect.html", "inspect.json", "values.csv", "landscapes.csv")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture
def run(bench: Bench, folder: Path) -> Run:
    """Certify a defense on the tiny card, with a convnet among its bases; return its run folder."""
    card = folder / "tiny.toml"
    card.write_text(Path(TINY).read_text() + CONVNET)

    def call(name: str, *more: object) -> Path:
        torch.set_num_threads(1)
        ran = bench("run", "--defense", name, "--dataset", card, "--out", folder / "runs", "--json", *more)
        assert ran.code == 0, ran.err
        return Path(json.loads(ran.out)[0]["path"])

    return call


def data(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "inspect.json").read_text())
    return found


def test_a_vit_a_convnet_and_a_denoiser_side_by_side(bench: Bench, run: Run, tmp_path: Path) -> None:
    folders = [run("lora"), run("none", "--base", "conv"), run("denoiser", "--set", "objective=mse")]
    out = tmp_path / "a"
    made = bench("inspect", *folders, "--out", out, "--images", 2, "--json")
    assert made.code == 0, made.err
    assert [f"wrote {out / name}" in made.err for name in FILES] == [True] * 4

    found = data(out)
    assert [r["folder"] for r in found["runs"]] == [f.name for f in folders]
    vit, conv, denoised = found["runs"]
    assert (vit["cam_layer"], vit["cam_grid"]) == ("blocks.0.norm1", [2, 2])
    assert (conv["cam_layer"], conv["cam_grid"]) == ("layer3", [8, 8]) and not conv["cam_of_changed_pixels"]
    assert denoised["cam_layer"] == "blocks.0.norm1" and denoised["cam_of_changed_pixels"]
    assert found["draws"] == 8 and found["seed"] == 0 and len(found["images"]) == 2
    assert "trained here for 8 epochs on 200 training images" in found["denoiser"]

    keys = {d["key"] for d in found["definitions"]}
    for one, printed in zip(found["runs"], json.loads(made.out), strict=True):
        assert printed["numbers"] == one["numbers"] and set(one["numbers"]) == keys
        for key, number in one["numbers"].items():
            if number["value"] is not None and number["low"] is not None:
                assert number["low"] <= number["value"] <= number["high"], key
        assert 0 <= one["numbers"]["cam_iou"]["value"] <= 1
        assert one["numbers"]["gradient_norm"]["value"] > 0 and one["numbers"]["gradient_norm"]["images"] == 2
        planes = [i["landscape"] for i in one["images"]]
        # The middle of the plane is the image itself, whose noisy copies have the loss that the table states.
        for image, plane in zip(one["images"], planes, strict=True):
            assert plane["losses"][10][10] == pytest.approx(sum(image["values"]["loss"]) / 8, abs=1e-5)
            assert plane["offsets"][0] == -0.5 and plane["along_gradient"]
            assert len(image["maps"]["noisy"]) == 8 and len(image["maps"]["clean"]) == 8
    # A number's mean over images is that of its values.
    of_images = [sum(i["values"]["loss"]) / 8 for i in vit["images"]]
    assert vit["numbers"]["loss"]["value"] == pytest.approx(sum(of_images) / 2)

    values = list(csv.DictReader((out / "values.csv").open()))
    assert len(values) == 3 * 2 * 8 * (len(keys) - 1)  # all but the ratio
    mine = [float(v["value"]) for v in values if v["run"] == folders[0].name and v["number"] == "loss"]
    assert sum(mine) / len(mine) == pytest.approx(vit["numbers"]["loss"]["value"])
    assert len((out / "landscapes.csv").read_text().splitlines()) == 1 + 3 * 2 * 21 * 21


def test_the_page_stands_alone_and_says_what_it_shows(bench: Bench, run: Run, tmp_path: Path) -> None:
    folders = [run("lora"), run("none", "--base", "conv")]
    made = bench("inspect", *folders, "--out", tmp_path, "--images", 2)
    assert made.code == 0, made.err
    page, found = (tmp_path / "inspect.html").read_text(), data(tmp_path)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "<script" not in page
    assert page.count("data:image/svg+xml") == 2  # a landscape for each image
    assert page.count("data:image/png") == 1 + 2 * (3 + 2 * 3)  # a scale; image, then runs, clean and twice noisy
    assert page.count("seed 0") >= 3 and page.count("8 noisy copies") >= 3 and "2 of 2 images" in page
    for one in found["definitions"]:
        assert one["title"] in page and one["title"] in made.out
    first = found["runs"][0]["numbers"]["loss"]["value"]
    assert f"{first:.3g} [" in page and f"{first:.3g} [" in made.out


def test_a_run_without_a_map_has_its_other_numbers(bench: Bench, run: Run, tmp_path: Path) -> None:
    own = defense("half_space")
    folder = run(own)
    unnamed = bench("inspect", folder, "--out", tmp_path)
    assert unnamed.code == 2 and f"--defense {own}" in unnamed.err
    made = bench("inspect", folder, "--out", tmp_path, "--images", 2, "--defense", own)
    assert made.code == 0, made.err
    (one,) = data(tmp_path)["runs"]
    assert "not those of a base classifier" in one["no_cam"] and one["numbers"]["cam_iou"]["value"] is None
    # Its margin is twice the mean pixel's distance from the threshold, which 64 pixels share: 2 / 8 in l2 at most.
    assert 0 < one["numbers"]["gradient_norm"]["value"] <= 0.25
    assert "no Grad-CAM" in (tmp_path / "inspect.html").read_text()


def test_the_denoiser_of_a_diffusion_run_is_used(bench: Bench, run: Run, tmp_path: Path) -> None:
    folder = run("diffusion")
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        made = bench("inspect", folder, "--out", out, "--images", 1)
        assert made.code == 0, made.err
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in FILES)  # at every call
    found = data(outs[0])
    assert found["denoiser"] == f"that of the run {folder.name}"
    assert found["runs"][0]["numbers"]["loss"]["low"] is None  # one image has no interval


def test_a_consistency_model_gives_no_score(bench: Bench, run: Run, tmp_path: Path) -> None:
    """It draws one clean image; Tweedie's formula needs their mean."""
    unet = saved(tmp_path / "unet", diffusers.CMStochasticIterativeScheduler())
    made = bench("inspect", run("diffusion", "--set", f"unet={unet}"), "--out", tmp_path / "out", "--images", 1)
    assert made.code == 0, made.err
    assert "trained here for 8 epochs" in data(tmp_path / "out")["denoiser"]


def test_what_cannot_be_inspected_is_refused_in_one_line(bench: Bench, run: Run, folder: Path, tmp_path: Path) -> None:
    first, louder = run("none"), run("none", "--sigma", ".5")
    other = run("none", "--split", "validation")
    card = folder / "tiny.toml"
    log = tmp_path / "log.tsv"
    log.write_text(logs.text(logs.ROWS))
    imported = bench("import", log, "--dataset", "cifar10", "--sigma", ".25", "--alpha", ".001", "--n", "1000",
                     "--out", tmp_path / "imported", "--json")  # fmt: skip
    shards = tmp_path / "shards"
    assert bench("run", "--defense", "none", "--dataset", card, "--shard", "1/2", "--out", shards).code == 0
    served, unfinished = (_changed(first, tmp_path / name) for name in ("served", "unfinished"))
    _edit(served, lambda info: info["arguments"].update(base="http://localhost:1"))
    _edit(unfinished, lambda info: info.update(status="started"))

    for words, why in (
        ([first, louder], "its sigma is 0.5, that of"),
        ([first, other], "its split is validation, that of"),
        ([first, first], "named twice"),
        ([first, "--images", 0], "--images 0: must be 1 to 8"),
        ([first, "--images", 9], "--images 9: must be 1 to 8"),
        ([json.loads(imported.out)["path"]], "an imported log comes without its model"),
        ([next(shards.glob("tiny-*/"))], "only shards of a run; bench merge"),
        ([served], "only answers queries, so there are no gradients"),
        ([unfinished], "is not finished; finish it first: bench run"),
        ([tmp_path], "no run folder"),
    ):
        refused = bench("inspect", *words, "--out", tmp_path / "out")
        assert refused.code == 2 and why in refused.err and refused.err.count("\n") == 1, refused.err
    assert not (tmp_path / "out").exists()
    assert bench("inspect", first).code == 2  # where to?
    assert "is a file" in bench("inspect", first, "--out", log).err


def test_missing_weights_are_named_and_nothing_is_trained(
    bench: Bench, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("lora")
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    refused = bench("inspect", folder, "--out", tmp_path / "out")
    assert refused.code == 2 and "the weights of lora are not in this cache; train them again" in refused.err


def test_the_missing_package_is_named(bench: Bench, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "grad_cam" in name else find(name, *a))
    refused = bench("inspect", run("none"), "--out", tmp_path)
    assert refused.code == 2 and "pip install 'certbench[inspect]'" in refused.err


def _changed(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (to / file.name).write_bytes(file.read_bytes())
    return to


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "run.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))
