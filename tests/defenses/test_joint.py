"""Joint and two-stage adaptation, and bases of another task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import globalstate, plugins
from bench.data.datasets import load_card, load_splits
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Defense
from bench.models import load as loading
from bench.models import probe
from bench.models.base import BaseModel, Classifier
from bench.models.names import blueprint
from bench.options import RunOptions
from bench.process.console import ConsoleReporter
from bench.runs import fitting
from bench.runs.plan import Plan, make_plans
from bench.runs.session import Session
from bench.training import loop
from defenses.joint import Joint
from defenses.two_stage import TwoStage
from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]
CPU = torch.device("cpu")
METHODS = [name for name in ("lora", "full", "adapter", "prompt", "bitfit", "head") if name in plugins.names()]
STEPS = 6  # of the default schedule on the tiny card: 2 epochs of 200 images in batches of 64


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "cache"))


def plan(defense: str, method: str = "lora", **given: Any) -> Plan:
    settings = (f"method={method}",) if defense in ("joint", "two-stage") else ()
    (only,) = make_plans(RunOptions(defenses=defense, dataset=TINY, settings=settings, **given))
    return only


def quiet(done: int, total: int, loss: float) -> None:
    pass


def untrained(a_plan: Plan) -> BaseModel:
    """Make the plan's base with the same random weights at every call."""
    with globalstate.fixed_rng(0):
        return loading.untrained_base(a_plan.card, a_plan.base, CPU, probe=not a_plan.cls.adapts)


def train(a_plan: Plan) -> tuple[Defense, dict[str, Any], str]:
    """Train a defense on an untrained base; return it, the record of its training, and the hash of its weights."""
    base = untrained(a_plan)
    data = load_splits(a_plan.card, "train")[0].first(200)
    defense = fitting.construct(a_plan, base, CPU)
    trained = fitting.train_or_load(a_plan, base, data, CPU, quiet, defense)
    return defense, trained.meta, trained.sha256


def classifier(defense: Defense) -> Classifier:
    (found,) = (m for m in defense.modules() if isinstance(m, Classifier))
    return found


# The defenses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["joint", "two-stage"])
def test_a_new_head_is_trained_together_with_the_method(name: str, method: str) -> None:
    a_plan = plan(name, method)
    base = untrained(a_plan)
    assert base.classes == 5
    fresh = fitting.construct(a_plan, base, CPU)
    head = classifier(fresh).head()
    assert head.out_features == 10
    assert all(p.requires_grad for p in head.parameters())
    of_method = fitting.construct(plan(method, base="vit"), untrained(plan(method, base="vit")), CPU)
    counted = [{n for n, p in classifier(d).named_parameters() if p.requires_grad} for d in (fresh, of_method)]
    assert counted[0] == counted[1] | {"model.head.weight", "model.head.bias"}  # and nothing else is trained

    trained, meta, _ = train(a_plan)
    before, after = (dict(d.named_parameters()) for d in (fresh, trained))
    assert all(torch.equal(before[n], after[n]) != p.requires_grad for n, p in before.items()), method
    assert meta["updated"] == sum(p.numel() for p in before.values() if p.requires_grad)


def test_the_head_is_new_even_for_the_same_number_of_classes() -> None:
    a_plan = plan("joint", base="vit")
    base = untrained(a_plan)
    assert base.classes == 10
    head = classifier(fitting.construct(a_plan, base, CPU)).head()
    assert not torch.equal(head.get_parameter("weight"), base.module.get_parameter("model.head.weight"))


def spied(monkeypatch: pytest.MonkeyPatch, cls: type[Defense], die_at: int = 0) -> list[bool]:
    """Record whether each training batch of ``cls`` is clean; interrupt the training at batch ``die_at``."""
    seen: list[bool] = []
    logits = cls.logits

    def watched(self: Defense, x: Tensor, draw: Any) -> Tensor:
        if len(seen) + 1 == die_at:
            raise RuntimeError("killed")
        seen.append(torch.equal(16 * x, (16 * x).round()))
        return logits(self, x, draw)

    monkeypatch.setattr(cls, "logits", watched)
    return seen


def test_both_take_the_same_steps_and_two_stage_takes_the_first_half_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, two_stage = spied(monkeypatch, Joint), spied(monkeypatch, TwoStage)
    train(plan("joint"))
    assert joint == [False] * STEPS
    joint.clear()
    train(plan("two-stage"))
    assert two_stage == [True] * (STEPS // 2) + [False] * (STEPS // 2)
    assert fitting.construct(plan("two-stage"), untrained(plan("two-stage")), CPU).schedule().epochs == 2


@pytest.mark.parametrize(
    ("die_at", "left"), [(2, ["checkpoint-clean.pt"]), (5, ["checkpoint-clean.pt", "checkpoint.pt"])]
)
def test_two_stage_killed_in_either_stage_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int, left: list[str]
) -> None:
    _, _, undisturbed = train(plan("two-stage"))
    monkeypatch.setenv("CERTBENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        spied(patch, TwoStage, die_at)
        with pytest.raises(BenchError, match="killed"):
            train(plan("two-stage"))
    assert sorted(f.name for f in (tmp_path / "other").glob("*/*.pt")) == left
    seen = spied(monkeypatch, TwoStage)
    _, _, resumed = train(plan("two-stage"))
    assert resumed == undisturbed
    assert len(seen) == STEPS - (die_at - 1)  # no step was repeated
    assert not list((tmp_path / "other").glob("*/*.pt"))


def test_the_sources_of_inner_defenses_are_part_of_the_identity() -> None:
    defense = fitting.construct(plan("two-stage", "full"), untrained(plan("two-stage")), CPU)
    assert set(fitting.context_of(defense).used) == {"joint inside", "full inside"}


# The base --------------------------------------------------------------------------------------------


def load(card: Any, train: Split, validation: Split, **given: Any) -> BaseModel:
    return loading.load_base(card, "vit-0to4", train, validation, CPU, quiet, **given)


def upside_down(split: Split, rows: Any) -> Split:
    images = np.array(split.images)
    images[rows] = images[rows][..., ::-1, :]
    return replace(split, images=images)


def test_a_base_of_some_classes_sees_no_image_of_the_others() -> None:
    card = load_card(TINY)
    splits = [s.first(200) for s in load_splits(card, "train", "validation")]
    base = load(card, *splits, probe=False)
    assert base.classes == 5
    assert base.meta["trained_on_classes"] == ["0", "1", "2", "3", "4"]
    others, own = ([upside_down(s, (s.labels < 5) == kept) for s in splits] for kept in (False, True))
    seen_others, seen_own = load(card, *others, probe=False), load(card, *own, probe=False)
    assert (seen_others.sha256, seen_others.meta) == (base.sha256, base.meta)
    assert seen_own.sha256 != base.sha256
    validation = splits[1].select(splits[1].labels < 5)
    right, total = base.accuracy(validation, list(range(len(validation))))
    assert right / total == base.meta["validation_clean_accuracy"] > 0.5


def test_its_labels_are_positions_in_the_recipes_list() -> None:
    card = load_card(TINY)
    card = replace(card, bases={"vit-0to4": replace(card.bases["vit-0to4"], classes=("7", "2"))})
    train_split, validation = load_splits(card, "train", "validation")
    base = load(card, train_split, validation, probe=False)
    for label, place in ((7, 0), (2, 1)):
        images = torch.from_numpy(validation.pixels(np.flatnonzero(validation.labels == label)))
        with torch.inference_mode():
            assert (base.module(images).argmax(1) == place).float().mean() > 0.7


def test_only_defenses_without_their_own_head_get_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []
    real = probe.linear_probe

    def spy(a_plan: Any, *rest: Any) -> Any:
        probed.append(a_plan.name)
        return real(a_plan, *rest)

    monkeypatch.setattr(loading, "linear_probe", spy)
    session = Session(CPU, tmp_path / "runs", ConsoleReporter())
    for name in ("joint", "two-stage"):
        assert session.materials(plan(name)).base.classes == 5
    assert probed == []
    probed_base = session.materials(plan("lora", base="vit-0to4")).base
    assert (probed, probed_base.classes) == (["vit-0to4"], 10)
    assert session.materials(plan("joint")).base.classes == 5  # not that of the runs in between
    assert probed_base.meta["before_probe"] == session.materials(plan("joint")).base.sha256 != probed_base.sha256


def test_which_base_each_defense_gets() -> None:
    found = make_plans(RunOptions(defenses="joint,lora,two-stage", dataset="cifar10", preset="paper"))
    published = "timm:vit_base_patch16_224.augreg_in21k"
    assert [p.base for p in found] == [published, "vit-b16", published]
    assert blueprint(found[0].card, published).made_for == 21843
    for preset in ("quick", "standard", "paper"):
        found = make_plans(RunOptions(defenses="joint,lora", dataset="digits", preset=preset))
        assert [p.base for p in found] == ["vit-0to4", "vit"]
    assert [p.base for p in make_plans(RunOptions(defenses="joint,lora", dataset="digits", base="vit"))] == [
        "vit",
        "vit",
    ]


# The command line ------------------------------------------------------------------------------------


def test_defenses_on_the_same_base_share_one_table(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    ran = bench("run", "--defense", "joint,two-stage,lora", "--dataset", TINY, "--out", out)
    assert ran.code == 0, ran.err
    assert ran.out.count("### ") == 2  # lora is on the card's own base
    ran = bench("run", "--defense", "none,lora", "--base", "vit-0to4", "--dataset", TINY, "--out", out)
    assert ran.code == 0, ran.err
    records = {f.name: json.loads((f / "run.json").read_text()) for f in out.iterdir()}
    joint = next(r for n, r in records.items() if n.startswith("tiny-joint"))
    origin = joint["identity"]["base"]["sha256"][:8]
    for record in records.values():
        base = record["base"]
        assert (base["clean_correct"] is None) == record["identity"]["defense"]["name"].startswith(("joint", "two"))
        if record["identity"]["base"]["name"] == "vit-0to4":
            assert base["trained_on_classes"] == ["0", "1", "2", "3", "4"]

    tables = json.loads(bench("report", out, "--format", "json").out)["tables"]
    (transfer,) = (t for t in tables if f"base vit-0to4 ({origin})" in t["heading"])
    assert {row["defense"]: row["base_clean_accuracy"] is None for row in transfer["rows"]} == {
        "joint": True,
        "two-stage": True,
        "none": False,
        "lora": False,
    }
    assert [len(t["rows"]) for t in tables if t is not transfer] == [1]
    heads = "with a dash under 'base, clean' the defense has its own head; the others use a linear probe"
    assert bench("report", out).out.count(heads) == 1

    for folder in out.glob("tiny-[jt]*"):
        verified = bench("verify", folder)
        assert verified.code == 0, verified.out + verified.err
        assert "5 images drawn again" in verified.out


def test_the_cost_of_training_is_estimated(bench: Bench) -> None:
    (row,) = json.loads(bench("run", "--defense", "joint", "--dataset", TINY, "--dry-run", "--json").out)
    assert row["train_seconds"] > 0


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("none", "method=none does not adapt a copy of the base"),
        ("retrain", "method=retrain does not adapt a copy of the base"),
        ("two-stage", "method=two-stage does not adapt a copy of the base"),
        ("nope", "unknown defense 'nope'"),
    ],
)
@pytest.mark.parametrize("name", ["joint", "two-stage"])
def test_an_unsuitable_method_is_refused(name: str, method: str, words: str) -> None:
    with pytest.raises(BenchError, match=words) as e:
        fitting.construct(plan(name, method), untrained(plan(name)), CPU)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'transfer_base = "vit-0to4"',
            "",
            "for preset quick; set transfer_base in its [presets.quick], or give --base",
        ),
        ('transfer_base = "vit-0to4"', 'transfer_base = "vit-0to9"', "unknown base 'vit-0to9'; did you mean vit-0to4"),
        ('["0", "1", "2", "3", "4"]', '["0", "ten"]', "unknown class in bases.vit-0to4.classes of card tiny 'ten'"),
        ('["0", "1", "2", "3", "4"]', '["0", "0"]', "bases.vit-0to4: classes: at least two, all different"),
        (
            "train_examples = 200",
            "train_examples = 1",
            "none of the 1 train images is of its classes; list other classes",
        ),
    ],
)
def test_a_card_that_cannot_serve_is_one_line(bench: Bench, tmp_path: Path, old: str, new: str, words: str) -> None:
    text = Path(TINY).read_text()
    assert old in text
    (tmp_path / "card.toml").write_text(
        text.replace(f"classes = {old}\nschedule", f"classes = {new}\nschedule")
        if old.startswith("[")
        else text.replace(old, new)
    )
    result = bench("run", "--defense", "joint", "--dataset", tmp_path / "card.toml", "--out", tmp_path / "runs")
    assert result.code == 2
    assert words in result.err and "Traceback" not in result.err


def test_all_means_the_defenses_the_card_has_a_base_for(tmp_path: Path) -> None:
    bare = tmp_path / "bare.toml"
    bare.write_text(Path(TINY).read_text().replace('transfer_base = "vit-0to4"', ""))
    everything = set(plugins.names())
    given: dict[str, Any] = {
        "tiny": {"dataset": TINY},
        "bare": {"dataset": str(bare)},
        "base": {"dataset": str(bare), "base": "vit"},
    }
    found = {k: {p.defense for p in make_plans(RunOptions(defenses="all", **v))} for k, v in given.items()}
    adapting = {"joint", "two-stage"}
    assert found == {"tiny": everything, "bare": everything - adapting, "base": everything}
