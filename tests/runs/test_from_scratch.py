"""Defenses trained from scratch: the preset's own base, untrained, and all images of the train part."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bench.data.datasets import load_card, load_splits, whole_train
from bench.data.split import Split
from bench.errors import BenchError
from bench.models.names import blueprint
from bench.options import RunOptions
from bench.records.record import read_run
from bench.runs import fitting
from bench.runs.plan import Plan, make_plans
from tests.helpers.commands import TINY, Bench, defense


def plans(dataset: str, defenses: str = "retrain", **given: Any) -> list[Plan]:
    return make_plans(RunOptions(**{"defenses": defenses, "dataset": dataset, "preset": "paper", **given}))


def test_the_bases_of_the_paper_presets() -> None:
    vit = "timm:vit_base_patch16_224.augreg_in21k"
    names = "joint,lora,retrain"
    assert [p.base for p in plans("cifar10", names)] == [vit, "vit-b16", "resnet110"]
    assert [p.base for p in plans("imagenet", names)] == [vit, f"{vit}_ft_in1k", "resnet50"]
    assert [p.base for p in plans("cifar10", names, preset="standard")] == [vit, "vit-b16", "vit-b16"]
    assert [p.from_scratch for p in plans("cifar10", names)] == [False, False, True]
    # With --base it shares a table with the others: the same base, trained on the same images.
    (given,) = plans("cifar10", base="vit-b16")
    assert (given.base, given.from_scratch) == ("vit-b16", False)
    # A defense that queries the base gets the trained one, whatever it trains.
    assert [p.from_scratch for p in plans("cifar10", f"none,{defense('half_space')}")] == [False, True]


def test_the_recipes_of_the_papers() -> None:
    cifar, imagenet = load_card("cifar10"), load_card("imagenet")
    cohen, resnet50 = blueprint(cifar, "resnet110"), blueprint(imagenet, "resnet50")
    assert (cohen.mean, cohen.std, cohen.size) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), None)
    assert cohen.mean_from == "the card's recipe"
    # The defaults of the released train.py.
    for made in (cohen, resnet50):
        s = made.schedule
        assert s is not None
        assert (s.epochs, s.batch, s.optimizer, s.lr, s.momentum) == (90, 256, "sgd", 0.1, 0.9)
        assert (s.weight_decay, s.decay, s.warmup) == (1e-4, "step", 0)
    assert (resnet50.mean, resnet50.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = resnet50.fresh(1000).model
    assert sum(p.numel() for p in model.parameters()) == 25_557_032  # torchvision's ResNet-50
    assert float(model.get_parameter("layer1.0.bn3.weight").detach().min()) == 1  # timm's default begins at zero
    large = blueprint(imagenet, "vit-l16")
    assert (large.architecture, large.schedule, large.made_for) == (
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
        None,
        1000,
    )
    assert blueprint(cifar, "vit-l16").made_for == 10
    (retrain,) = plans("cifar10")
    c = retrain.config
    assert (c.epochs, c.batch, c.optimizer, c.lr, c.momentum) == (90, 400, "sgd", 0.1, 0.9)
    assert (c.weight_decay, c.decay, c.warmup) == (1e-4, "step", 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("", "schedule: missing; only a pretrained model needs none"),
        ("mean = [0.5, 0.5]\nschedule = { epochs = 1 }", "bases.vit.mean: 2 values for 1 channels"),
        ("mean = [0.5]\npretrained = true", "mean, std: a pretrained model has its own"),
        ('classes = ["0", "1"]\npretrained = true', "classes: no schedule trains on them"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(tmp_path: Path, keys: str, message: str) -> None:
    text = Path(TINY).read_text().partition("[bases.vit]")[0]
    (tmp_path / "card.toml").write_text(f'{text}[bases.vit]\nmodel = "vit_tiny_patch16_224"\n{keys}')
    with pytest.raises(BenchError, match=re.escape(message)):
        load_card(str(tmp_path / "card.toml"))


def test_all_images_of_the_train_part_once() -> None:
    card = load_card("digits")
    train, validation, test = load_splits(card, "train", "validation", "test")
    whole = whole_train(card, train, validation)
    assert len(whole) == len(train) + len(validation) == 1297
    everything = np.concatenate([whole.integers(), test.integers()])
    rows = sorted(map(bytes, everything.reshape(1797, 64)))
    assert rows == sorted(map(bytes, load_digits().images.astype(np.uint8).reshape(1797, 64)))
    np.testing.assert_array_equal(whole.labels[997:], validation.labels)


@pytest.fixture
def card(tmp_path: Path) -> str:
    """The tests' card with a small ResNet for defenses trained from scratch."""
    text = Path(TINY).read_text().replace("train_examples = 200\n", 'scratch_base = "resnet"\n')
    text += """
[bases.resnet]
model = "resnet110"
args = { blocks = 1, in_chans = 1 }
mean = [0.3]
std = [0.4]
schedule = { epochs = 1 }
"""
    (tmp_path / "scratch.toml").write_text(text.replace('name = "tiny"', 'name = "scratch"'))
    return str(tmp_path / "scratch.toml")


@pytest.mark.parametrize(
    ("given", "images", "stated"),
    [
        ({}, 1597, "trained on 1,597 images, the 100 of validation included"),
        (
            {"search": ("lr=1e-3,1e-4",)},
            1497,
            "trained on 1,497 images, without the 100 of validation, that --search uses",
        ),
        ({"split": "validation"}, 1497, "trained on 1,497 images, without the 100 of validation, that are certified"),
        ({"base": "vit"}, 1497, None),
        ({"defenses": "none"}, 1497, None),
    ],
)
def test_which_images_a_run_trains_on(card: str, given: dict[str, Any], images: int, stated: str | None) -> None:
    (plan,) = plans(card, **{"preset": "quick", **given})
    train, validation = load_splits(plan.card, "train", "validation")
    found = plan.training_images(train, validation)
    assert (len(found), found.sha256() == train.sha256()) == (images, images == 1497)
    given_weights = replace(plan, weights=Path("mine.safetensors"))
    assert given_weights.training_images(train, validation) is train
    assert found.origin == ("scikit-learn" if stated is None else f"scikit-learn; {stated}")


def test_a_run_from_scratch_trains_no_base_and_says_on_which_images_it_trained(
    bench: Bench, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))
    seen: list[Split] = []
    real = fitting.fit

    def spy(plan: Plan, base: Any, train: Split, *rest: Any) -> Any:
        seen.append(train)
        return real(plan, base, train, *rest)

    monkeypatch.setattr(fitting, "fit", spy)
    run = ["run", "--defense", "retrain", "--dataset", card, "--set", "epochs=0.1", "--examples", "2"]
    ran = bench(*run, "--out", tmp_path / "runs")
    assert ran.code == 0, ran.err
    stated = "trained on 1,597 images, the 100 of validation included"
    assert f"retrain: {stated}" in ran.err
    assert [len(train) for train in seen] == [1597]
    assert list((tmp_path / "cache").glob("*-base-*")) == []
    assert "not trained, since only its architecture is used" in ran.err
    (folder,) = (tmp_path / "runs").glob("scratch-retrain-*")
    info = read_run(folder).info
    assert info.data["train"] == f"scikit-learn; {stated}"
    base = info.as_json()["base"]
    assert (base["source"], base["clean_correct"]) == ({"kind": "untrained"}, None)
    assert (base["preprocessing"]["mean"], base["preprocessing"]["size"]) == ([pytest.approx(0.3)], [32, 32])
    assert info.identity.base is not None and info.identity.base.name == "resnet"
    verified = bench("verify", folder)  # the untrained base is the same again
    assert verified.code == 0 and "cannot be rebuilt" not in verified.out, verified.out


def test_with_a_base_given_it_is_trained_as_the_other_defenses(bench: Bench, card: str, tmp_path: Path) -> None:
    command = ["run", "--defense", "retrain,none", "--base", "vit", "--dataset", card, "--set", "epochs=0.1"]
    ran = bench(*command, "--examples", "2", "--out", tmp_path / "runs")
    assert ran.code == 0, ran.err
    assert ran.out.count("### ") == 1  # one table
    for folder in (tmp_path / "runs").glob("scratch-*"):
        info = read_run(folder).info
        assert info.data["train"] == "scikit-learn"
        assert info.base is not None and info.base.clean_correct is not None
