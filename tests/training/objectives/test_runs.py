"""Objectives in runs: refused before anything is trained, resumed to the same bytes, stated and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.data.datasets import load_card, load_splits
from bench.errors import BenchError
from bench.interface import Access, Defense
from bench.io.files import scratch_cache
from bench.models.base import BaseModel
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.records.record import read_run
from bench.runs import confidence, fitting
from bench.runs.context import PartTraining
from bench.runs.doctor import examine
from bench.runs.plan import Plan, make_plans
from bench.smoothing.noise import Noise
from bench.training import loop, objectives
from tests.helpers.commands import TINY, Bench, defense

CPU = torch.device("cpu")
NEW = ["smoothadv", "smoothadv-ddn", "macer", "smoothmix", "catrs"]
ATTACKING = [name for name in NEW if name != "macer"]


def plan(name: str, objective: str, *given: str, **options: Any) -> Plan:
    return make_plans(RunOptions(defenses=name, dataset=TINY, objective=objective, settings=given, **options))[0]


# Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ATTACKING)
@pytest.mark.parametrize("settings", [(), ("method=gradient",)])
def test_an_attack_needs_more_than_queries(objective: str, settings: tuple[str, ...]) -> None:
    with pytest.raises(BenchError, match=f"--objective {objective} attacks .* coordinator gets no gradients") as e:
        plan("coordinator", objective, *settings)
    assert "use one of gaussian, stability, consistency, dign, macer" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_base_that_only_answers_queries_is_refused() -> None:
    with pytest.raises(BenchError, match="lora needs WEIGHTS access"):
        plan("lora", "smoothadv", base="http://127.0.0.1:9/v2/models/one")
    with pytest.raises(BenchError, match="needs GRADIENT access"):
        plan("denoiser", "smoothadv", "objective=clf", base="http://127.0.0.1:9/v2/models/one")


@pytest.mark.parametrize("settings", [(), ("objective=mse",), ("objective=clf,stab",), ("objective=stab+mse",)])
def test_a_denoiser_that_learns_no_labels_has_a_loss_of_its_own(settings: tuple[str, ...]) -> None:
    with pytest.raises(BenchError, match="denoiser has a loss of its own"):
        plan("denoiser", "smoothadv", *settings)


def test_what_trains_nothing_may_stand_beside_what_is_attacked() -> None:
    plans = make_plans(RunOptions(defenses="none,lora", dataset=TINY, objective="smoothadv"))
    assert [p.defense for p in plans] == ["none", "lora"]
    assert plan("coordinator", "macer").objective == "macer"
    assert plan("denoiser", "smoothadv", "objective=clf", "access=query").objective == "smoothadv"
    assert plan("retrain", "smoothadv").cls.access is Access.NONE


# Trained ----------------------------------------------------------------------------------------------------------


@cache  # its weights are random, so another one would train to other weights
def random_base(name: str, probe: bool) -> BaseModel:
    return untrained_base(load_card(TINY), name, CPU, probe)


def trained(of: Plan) -> dict[str, torch.Tensor]:
    """The weights of a plan, on an untrained base and few images."""
    (train,) = load_splits(of.card, "train")
    base = random_base(of.base, not of.cls.adapts)
    one = fitting.construct(of, base, CPU, PartTraining(train.first(64), lambda *_: None))
    return fitting.train_or_load(of, base, train.first(64), CPU, lambda *_: None, one).state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception):
    pass


CASES: list[tuple[str, str, tuple[str, ...]]] = [(name, "lora", ("batch=16",)) for name in NEW]
CASES += [("smoothadv", name, given) for name, given in (("full", ("batch=16",)), ("head", ("batch=16",)))]
CASES += [("smoothmix", "denoiser", ("objective=clf", "batch=16", "epochs=2")), ("smoothadv", "two-stage", ())]


@pytest.mark.parametrize(("objective", "name", "given"), CASES)
def test_a_killed_training_resumes_to_the_same_weights(
    objective: str, name: str, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its second checkpoint; the one that is not disturbed trains in a cache of its own."""
    of = plan(name, objective, *given)
    with scratch_cache():
        undisturbed = trained(of)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    save, saved = loop.TrainingJob._save, 0

    def dying(*args: Any) -> None:
        nonlocal saved
        save(*args)
        saved += 1
        if saved == 2:
            raise Killed

    with scratch_cache():
        with monkeypatch.context() as m:
            m.setattr(loop.TrainingJob, "_save", dying)
            with pytest.raises(BenchError, match="Killed"):
                trained(of)
        assert same(trained(of), undisturbed)
    assert not same(undisturbed, _gaussian(of))


def _gaussian(of: Plan) -> dict[str, torch.Tensor]:
    with scratch_cache():
        return trained(plan(of.defense, "gaussian", *of.options.settings))


def test_clf_with_gaussian_is_the_cross_entropy_of_the_denoised_image() -> None:
    """As before ``--objective`` trained it: the same numbers."""
    of = plan("denoiser", "gaussian", "objective=clf")
    base = untrained_base(of.card, of.base, CPU)
    one = fitting.construct(of, base, CPU)
    (train,) = load_splits(of.card, "train")
    x, y = torch.from_numpy(train.pixels(range(8))), torch.from_numpy(train.labels[:8])
    losses = []
    for by_objective in (True, False):
        draw = loop.TrainingDraw(Noise(0, "train"), 0, 1, torch.arange(8), 0.25, CPU, [one])
        if by_objective:
            job = loop.TrainingJob(train, (), 0.25, of.training_objective, 0, CPU, Path(), lambda *_: None)
            losses.append(one.loss(x, y, draw, job))
        else:
            noisy = x + 0.25 * draw.normal(*x.shape[1:])
            losses.append(torch.nn.functional.cross_entropy(one.logits(noisy, draw), y))
    assert torch.equal(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("objective", NEW)
@pytest.mark.parametrize(("name", "given"), [("lora", ()), ("denoiser", ("objective=clf",)), ("retrain", ())])
def test_they_conform(objective: str, name: str, given: tuple[str, ...]) -> None:
    found = list(examine(plan(name, objective, *given)))
    assert [f for f in found if f.problem] == []
    assert len(found) == 7


def test_catrs_counts_the_votes_of_the_gaussian_model_on_its_own_images() -> None:
    """Of a classifier that sees whether the mean pixel is above one half: the fraction is that of a normal variable."""
    of = plan("lora", "catrs")
    (train,) = load_splits(of.card, "train")
    train = train.first(20)

    def logits(x: torch.Tensor, draw: Any) -> torch.Tensor:
        seen = x.flatten(1).mean(1, keepdim=True) - 0.33
        return torch.cat([seen, -seen], 1)

    with scratch_cache():
        counted = confidence.probabilities(logits, {"seed": 0}, train, 2, 2000, CPU, lambda *_: None)
    found = counted.state["probabilities"]
    mean = torch.from_numpy(train.pixels(range(20))).flatten(1).mean(1)
    expected = torch.special.ndtr((mean - 0.33) * 8 / objectives.REFERENCE_SIGMA)  # the mean of 64 pixels
    assert torch.allclose(found.sum(1), torch.ones(20))
    # 2,000 votes: five standard errors of 20 images, a false alarm in 90,000.
    spread = (expected * (1 - expected) / 2000).sqrt()
    assert bool(((found[:, 0] - expected).abs() <= 5 * spread + 1e-6).all())


# Stated and recorded ----------------------------------------------------------------------------------------------


def test_a_run_states_and_records_constants_and_cost(bench: Bench, tmp_path: Path) -> None:
    words = (
        "smoothadv: steps 2, copies 2, epsilon 0.2846, warmup 0.11111; as released for MNIST at this noise; "
        "distances times 8/28, the sides of the images"
    )
    args = ("run", "--defense", "lora", "--dataset", TINY, "--objective", "smoothadv")
    dry = bench(*args, "--dry-run")
    assert dry.code == 0, dry.err
    assert "(6 forward and 6 backward passes of an image in a step)" in dry.out
    assert f"{words}; preset quick reduces steps from 10, copies from 4" in dry.out
    (estimate,) = json.loads(bench(*args, "--dry-run", "--json").out)
    assert (estimate["step_forwards"], estimate["step_backwards"]) == (6, 6)
    ran = bench(*args, "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert words in ran.err
    (path,) = (p.parent for p in tmp_path.glob("*/run.json"))
    info = read_run(path).info
    assert any(words in note for note in info.defense.notes)
    assert info.identity.defense.objective == "smoothadv"
    constants = {"steps": 2, "copies": 2, "epsilon": 8 / 28 * (255 / 256), "warmup": 10 / 90}
    assert info.identity.defense.objective_constants == constants
    assert info.cost is not None
    assert (info.cost.step_forwards, info.cost.step_backwards) == (6, 6)
    assert bench("verify", path).code == 0


def test_a_plain_objective_records_no_constants() -> None:
    of = plan("lora", "gaussian")
    assert of.training_objective.constants() == {}
    assert of.step_cost == objectives.Cost(1, 1)
    assert plan(defense("own_loss"), "gaussian").step_cost is None


def test_the_budget_of_the_preset_decides_the_weights() -> None:
    """Quick and standard have other constants, so other weights in the cache; plain objectives have the same."""
    cpu = torch.device("cpu")

    def identity(objective: str, preset: str) -> Any:
        of = make_plans(RunOptions(defenses="lora", dataset="digits", objective=objective, preset=preset))[0]
        base = untrained_base(of.card, of.base, cpu)
        (train,) = load_splits(of.card, "train")
        built = fitting.construct(of, base, cpu)
        return fitting.weights_identity(of, base, train, cpu, fitting.context_of(built))

    assert "objective_constants" not in identity("consistency", "quick")
    quick, paper = identity("macer", "quick"), identity("macer", "paper")
    assert (quick["objective_constants"]["copies"], paper["objective_constants"]["copies"]) == (4, 16)


def test_a_defense_says_whether_objectives_train_and_attack_it() -> None:
    class Queries(Defense):
        access = Access.QUERY

    class Own(Defense):
        def loss(self, *args: Any) -> torch.Tensor:
            return torch.zeros(())

    assert (Queries.uses_objective(None), Queries.differentiable(None)) == (True, False)
    assert (Own.uses_objective(None), Own.differentiable(None)) == (False, True)


@pytest.mark.parametrize("name", ["lora", "retrain"])
def test_one_thread_and_two_draw_the_same_votes(
    name: str, bench: Bench, tmp_path: Path, set_threads: Callable[[int], None]
) -> None:
    counts = []
    for threads in (1, 2):
        set_threads(threads)
        out = tmp_path / str(threads)
        ran = bench("run", "--defense", name, "--dataset", TINY, "--objective", "smoothadv", "--out", out)
        assert ran.code == 0, ran.err
        (path,) = (p.parent for p in out.glob("*/run.json"))
        counts.append([(c.index, c.predicted, c.radius, c.n, c.top_count) for c in read_run(path).counted])
    assert counts[0] == counts[1]
    assert len(counts[0]) == 8
