"""bench export --weights: folders of peft and timm that compute what was certified, with a model card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import timm
import torch
import transformers
from torch import Tensor

from bench.data.datasets import load_card, load_split
from bench.records.logs import export_log
from bench.records.record import read_run
from bench.runs.model_card import model_card
from bench.training.weights import stored
from tests.helpers import timmfolders
from tests.helpers.commands import TINY, Result, defense
from tests.helpers.records import made_up

Bench = Callable[..., Result]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(bench: Bench, out: Path, name: str, *more: object) -> Path:
    """Certify a defense on the tiny card; return its run folder."""
    ran = bench("run", "--defense", name, "--dataset", TINY, "--out", out, *more)
    assert ran.code == 0, ran.err
    (folder,) = out.iterdir()
    return folder


def counts(folder: Path) -> dict[int, list[object]]:
    """Return everything that a run's certificates say of their images, but the seconds."""
    lines = map(json.loads, (folder / "certificates.jsonl").read_text().splitlines())
    return {line["index"]: [v for k, v in line.items() if k != "seconds"] for line in lines}


def pixels() -> Tensor:
    clean = torch.from_numpy(load_split(load_card(TINY), "test").pixels(np.arange(8)))
    return clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def info(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def by_timm(folder: Path, x: Tensor) -> Tensor:
    """Compute the logits of pixels by timm alone, with the mean and std of the folder's config."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    with torch.no_grad():
        out: Tensor = model((x - torch.tensor(config["mean"])) / torch.tensor(config["std"]))
    return out


@pytest.mark.parametrize("targets", ["linear", "qv"])
def test_a_lora_run_goes_out_as_a_peft_folder_and_comes_back_with_the_same_certificates(
    bench: Bench, tmp_path: Path, targets: str
) -> None:
    first = run(bench, tmp_path / "runs", "lora", "--set", f"targets={targets}")
    out = tmp_path / "adapter"
    exported = bench("export", first, "--weights", out)
    assert exported.code == 0, exported.err
    assert {f.name for f in out.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    # As a timm user would load it: the base as it is exported, and peft.
    base = tmp_path / "base"
    assert bench("export", run(bench, tmp_path / "none", "none"), "--weights", base).code == 0
    model = timm.create_model(f"local-dir:{base}", pretrained=True).eval()
    adapted = peft.PeftModel.from_pretrained(model, str(out)).eval()
    merged = tmp_path / "merged"
    assert bench("export", first, "--weights", merged, "--merged").code == 0
    x = pixels()
    config = json.loads((base / "config.json").read_text())["pretrained_cfg"]
    with torch.no_grad():
        logits = adapted((x - torch.tensor(config["mean"])) / torch.tensor(config["std"]))
    assert (logits - by_timm(base, x)).abs().max() > 1e-2
    assert (logits - by_timm(merged, x)).abs().max() < 1e-4

    again = run(bench, tmp_path / "again", "lora", "--weights", out)
    assert counts(again) == counts(first)
    cost, about = info(again)["cost"], info(again)["defense"]
    assert cost["trained_here"] == 0
    assert cost["trained_elsewhere"] == info(first)["cost"]["trained_here"] == cost["trainable_nominal"]
    assert cost["train_seconds"] is None
    sha256 = info(again)["identity"]["defense"]["weights"]
    assert re.fullmatch(r"[0-9a-f]{64}", sha256) and about["weights_sha256"] == sha256
    assert about["weights_file"] == "adapter" and about["trained_elsewhere"] == [f"adapter ({sha256[:8]})"]
    assert about["notes"][0].startswith("lora takes rank=")
    assert bench("verify", again, "--deep").code == 0

    # A run of a folder can be exported again.
    assert bench("export", again, "--weights", tmp_path / "twice").code == 0
    assert "trained elsewhere, under noise that was not stated." in (tmp_path / "twice" / "README.md").read_text()
    files = [(f / "adapter_model.safetensors").read_bytes() for f in (out, tmp_path / "twice")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["full", "retrain", "head", "bitfit", "joint", "two-stage"])
def test_a_fine_tuned_base_goes_out_as_a_timm_folder_and_gives_the_same_counts_as_a_base(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    first = run(bench, tmp_path / "runs", name)
    out = tmp_path / "model"
    exported = bench("export", first, "--weights", out)
    assert exported.code == 0, exported.err
    assert {f.name for f in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    again = run(bench, tmp_path / "again", "none", "--base", out)
    assert counts(again) == counts(first)
    assert "its classes are named and ordered as those of card tiny" in info(again)["base"]["classes"]
    assert info(again)["base"]["preprocessing"]["normalisation_from"] == "config.json"


def test_an_adapter_of_a_probed_base_brings_its_head_and_a_merged_model_its_resizing(
    bench: Bench, tmp_path: Path
) -> None:
    """On a published base of 3 classes, 3 channels and 16x16 pixels; the card has 10 classes, grey, 8x8."""
    args: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    timmfolders.save(tmp_path / "published", classes=3, **args)
    first = run(bench, tmp_path / "runs", "lora", "--base", tmp_path / "published", "--set", "lr=.1")
    assert bench("export", first, "--weights", tmp_path / "adapter").code == 0
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stated["modules_to_save"], stated["base_model_name_or_path"]) == (["head"], "published")

    config = json.loads((tmp_path / "published" / "config.json").read_text())["pretrained_cfg"]
    # timm gives the published features a new head, and the folder brings that of the probe.
    model = timm.create_model(f"local-dir:{tmp_path / 'published'}", pretrained=True, num_classes=10)
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    x = torch.nn.functional.interpolate(pixels(), (16, 16), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        logits = adapted((x - mean) / std)

    assert bench("export", first, "--weights", tmp_path / "merged", "--merged").code == 0
    kept = json.loads((tmp_path / "merged" / "config.json").read_text())["pretrained_cfg"]
    assert kept["input_size"] == [3, 16, 16] and kept["mean"] == pytest.approx(config["mean"])
    plain = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    with torch.no_grad():
        assert (plain((x - mean) / std) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert counts(run(bench, tmp_path / "again", "none", "--base", tmp_path / "merged")) == counts(first)

    back = run(bench, tmp_path / "back", "lora", "--base", tmp_path / "published", "--weights", tmp_path / "adapter")
    assert counts(back) == counts(first)
    assert info(back)["identity"]["defense"]["config"]["head"] is True


def test_a_safetensors_file_goes_out_with_its_config_beside_it(bench: Bench, tmp_path: Path) -> None:
    first = run(bench, tmp_path / "runs", "lora")
    out = tmp_path / "merged.safetensors"
    assert bench("export", first, "--weights", out).code == 0
    assert {f.name for f in tmp_path.glob("merged*")} == {"merged.safetensors", "merged.json", "merged.md"}
    assert counts(run(bench, tmp_path / "again", "none", "--base", out)) == counts(first)


def test_the_model_card_says_what_the_record_says(bench: Bench, tmp_path: Path) -> None:
    first = run(bench, tmp_path / "runs", "lora", "--set", "rank=4")
    assert bench("export", first, "--weights", tmp_path / "adapter").code == 0
    text = (tmp_path / "adapter" / "README.md").read_text()
    record = info(first)
    assert "library_name: peft" in text
    assert "Out of reach with these votes: radius 0.5." in text
    for point in record["metrics"]["certified_accuracy"][:2]:
        value, low, high = (f"{100 * point[k]:.1f}%" for k in ("value", "low", "high"))
        assert f"| {point['radius']:g} | {value} | {low} to {high} |" in text
    assert record["identity"]["base"]["sha256"] in text
    assert record["identity"]["defense"]["weights"] in text
    assert "sigma 0.25" in text and "8 test images" in text and "alpha 0.001" in text
    assert f"    bench run --defense lora --dataset {TINY} --sigma 0.25 --set lora.rank=4" in text
    assert "License: " in text
    assert "| 0.5 |" not in text  # no dash, no zero: at n = 100 no image can be certified there


def test_a_record_cannot_write_html_or_commands_into_the_model_card(tmp_path: Path) -> None:
    folder = made_up(tmp_path, [990, 1000, 700, 400], counted=True, name="none")
    found = info(folder)
    found["classes"] = ["<script>", "a|b", "line\nbreak", *found["classes"][3:]]
    found["base"]["source"] = {"kind": "hub", "id": "x/y\ntags: [evil]"}
    found["arguments"] = {"defenses": "none\n\n# heading", "dataset": "d"}
    (folder / "run.json").write_text(json.dumps(found))
    text = model_card(read_run(folder), "timm", ["line\n# two"])
    assert "<script>" not in text.replace("\\<script\\>", "") and "a\\|b" in text
    assert "\ntags: [evil]" not in text and "base_model" not in text
    assert "\n# heading" not in text and "\n# two" not in text


@pytest.mark.parametrize(
    ("name", "settings"), [("adapter", ()), ("prompt", ()), ("none", ("--set", "clip=true")), ("denoiser", ())]
)
def test_a_function_that_is_not_one_timm_model_is_refused_in_one_line(
    bench: Bench, tmp_path: Path, name: str, settings: tuple[str, ...]
) -> None:
    first = run(bench, tmp_path / "runs", name, *settings)
    refused = bench("export", first, "--weights", tmp_path / "out")
    assert refused.code == 2
    line = refused.err.strip().splitlines()[-1]
    assert f"the function of {name} is not one timm model" in line
    assert "possible for defenses that change the base's own weights" in line
    weights = info(first)["identity"]["defense"]["weights"]
    assert weights is None or f"its own tensors are {stored(weights)}, which bench run --weights takes" in line
    assert sorted(f.name for f in tmp_path.iterdir()) == ["runs"]  # nothing is left behind


def test_weights_that_are_not_in_the_cache_are_not_trained(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, untrained = run(bench, tmp_path / "lora", "lora"), run(bench, tmp_path / "none", "none")
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "empty"))
    for folder, what, name in ((trained, "lora", "lora"), (untrained, "base vit", "none")):
        refused = bench("export", folder, "--weights", tmp_path / "out")
        assert refused.code == 2
        assert f"the weights of {what} are not in this cache; train them again: bench run" in refused.err
        assert f"--defense {name} --dataset {TINY} " in refused.err
        assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "empty").glob("*/*.safetensors"))


def test_a_defense_file_is_run_only_where_it_is_named(bench: Bench, tmp_path: Path) -> None:
    file = defense("folds")
    first = run(bench, tmp_path / "runs", file)
    refused = bench("export", first, "--weights", tmp_path / "out")
    assert refused.code == 2
    assert f"its defense is a file, run only where you name it: --defense {file}" in refused.err
    named = bench("export", first, "--weights", tmp_path / "out", "--defense", file)
    assert "run only where you name it" not in named.err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda i: i["metrics"]["certified_accuracy"][0].update(value=1.5), "fails its audit"),
        (lambda i: i.update(status="started"), "is not finished; finish it first: bench run"),
        (lambda i: i["arguments"].update(base="http://localhost:9/v2/models/m"), "its base is a server's"),
        (lambda i: i["arguments"].update(weights="/none.safetensors"), "no file /none.safetensors"),
    ],
)
def test_a_record_that_is_not_true_is_not_exported(bench: Bench, tmp_path: Path, damage: Any, words: str) -> None:
    first = run(bench, tmp_path / "runs", "full")
    found = info(first)
    damage(found)
    (first / "run.json").write_text(json.dumps(found))
    refused = bench("export", first, "--weights", tmp_path / "out")
    assert refused.code == 2 and words in refused.err and "Traceback" not in refused.err
    assert not (tmp_path / "out").exists()


def test_changed_code_of_the_defense_is_refused(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(bench, tmp_path / "runs", "full")
    monkeypatch.setattr("bench.plugins.source_sha256", lambda path: "0" * 64)
    refused = bench("export", first, "--weights", tmp_path / "out")
    assert refused.code == 2 and "the code of defense full has changed since certbench" in refused.err


def test_nothing_is_overwritten_and_the_log_is_still_exported(bench: Bench, tmp_path: Path) -> None:
    first = run(bench, tmp_path / "runs", "full")
    (tmp_path / "model").mkdir()
    assert "exists; give another name" in bench("export", first, "--weights", tmp_path / "model").err
    assert bench("export", first, "--weights", tmp_path / "a", "--out", tmp_path / "b").code == 2
    assert bench("export", first, "--out", tmp_path / "log.tsv").code == 0
    assert (tmp_path / "log.tsv").read_text() == export_log(read_run(first)) == bench("export", first).out


def test_a_model_of_transformers_goes_out_with_the_line_that_registers_it(bench: Bench, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "image_size": 16, "patch_size": 8, "num_labels": 10}
    config = transformers.ViTConfig(**sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(tmp_path / "vit")
    first = run(bench, tmp_path / "runs", "none", "--base", tmp_path / "vit")
    exported = bench("export", first, "--weights", tmp_path / "model")
    assert exported.code == 0, exported.err
    registers = "import bench.models.architectures  # registers vit_of_transformers with timm"
    lines = (tmp_path / "model" / "README.md").read_text().splitlines()
    load = "model = timm.create_model('local-dir:model', pretrained=True)"
    assert lines.index(f"    {registers}") + 1 == lines.index(f"    {load}")
    code = f"import timm\n{registers}\n{load}\nprint(type(model).__name__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "VisionTransformer\n"
    config_of = json.loads((tmp_path / "model" / "config.json").read_text())["pretrained_cfg"]
    assert config_of["interpolation"] == "bicubic"
    again = run(bench, tmp_path / "again", "none", "--base", tmp_path / "model")
    assert counts(again) == counts(first)
