"""A defense's context: shared parts, hashed files, inner defenses; and the stages of a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bench.data.split import Split
from bench.errors import BenchError
from bench.training import loop, objectives
from tests.helpers.commands import TINY, Result

Bench = Callable[..., Result]

PLUGIN = '''
"""A linear map of the pixels from a shared part or a file, in front of the base."""
from dataclasses import dataclass
from typing import Literal
import torch
from safetensors.torch import load_file
from torch import nn
from bench.interface import Access, Defense, Part, Schedule

@dataclass(frozen=True)
class Scale(Part):
    lr: float
    def build(self, classes, shape):
        return nn.Conv2d(shape[0], shape[0], 1)
    def fit(self, module, job):
        for name, sigma in (("calm", 0.0), ("loud", 0.5)):
            job.at(name, sigma).train(
                module, lambda x, y, d: (module(x + d.sigma * d.normal(*x.shape[1:])) - x).square().mean(),
                Schedule(epochs=1, batch=16, lr=self.lr))

class User(Defense):
    access = Access.WEIGHTS
    trains = "denoiser-trained"
    @dataclass(frozen=True)
    class Config:
        source: str = ""
        inner: str = ""
        lr: float = 1e-2
    def build(self):
        if self.config.source:
            self.scale = nn.Conv2d(1, 1, 1).requires_grad_(False)
            self.scale.load_state_dict(load_file(self.context.hub(self.config.source, "scale.safetensors")))
        else:
            self.scale = self.context.once(Scale(self.config.lr))
        if self.config.inner:
            self.classifier = self.context.inner(self.config.inner, rank=2)
    def schedule(self):
        return self.classifier.schedule()
    def merge(self):
        if self.config.inner:
            self.classifier.merge()
    def logits(self, x, draw):
        x = self.scale(x)
        return self.classifier.logits(x, draw) if self.config.inner else self.context.base(x)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "user.py"
    file.write_text(PLUGIN)
    return file


def infos(out: Path) -> list[dict[str, Any]]:
    return [json.loads(f.read_text()) for f in sorted(out.glob("*/run.json"))]


def test_a_part_is_trained_once_and_counted_for_every_user(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin.py"
    twin.write_text(PLUGIN)
    trained: list[str] = []
    entry_save = loop.TrainingJob.train

    def spy(job: loop.TrainingJob, *args: Any, **kwargs: Any) -> None:
        trained.append(job.checkpoint.stem)
        entry_save(job, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainingJob, "train", spy)
        args = ("--dataset", TINY, "--sigma", ".25,.5", "--out", tmp_path / "runs")
        ran = bench("run", "--defense", plugin, *args)
        assert ran.code == 0, ran.err
        assert [t for t in trained if "-" in t] == ["checkpoint-calm", "checkpoint-loud"]
        # A part with another setting is another part.
        assert bench("run", "--defense", plugin, *args, "--set", "lr=1e-3").code == 0
        assert len([t for t in trained if "-" in t]) == 4
    found = infos(tmp_path / "runs")
    assert len(found) == 4
    for info in found:
        cost = info["cost"]
        assert (cost["trainable_nominal"], cost["trained_here"], cost["trained_elsewhere"]) == (0, 2, 0)
        assert cost["parameters"] > 1000  # those of the base, which every vote passes through, and of the part
        assert cost["train_seconds"] > 0
        assert info["identity"]["defense"]["weights"] is None
        assert len(info["identity"]["defense"]["parts"]) == 1


def test_a_file_from_a_folder_counts_as_trained_elsewhere_and_its_hash_is_identity(
    bench: Bench, plugin: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for value in (1.0, 2.0):
        save_file({"weight": torch.full((1, 1, 1, 1), value), "bias": torch.zeros(1)}, folder / "scale.safetensors")
        args = ("--dataset", TINY, "--out", tmp_path / "runs", "--set", f"source={folder}")
        ran = bench("run", "--defense", plugin, *args, "--columns", "all")
        assert ran.code == 0, ran.err
        assert f"| {folder} " in ran.out  # the column of extra data
    one, other = infos(tmp_path / "runs")
    assert (one["cost"]["trained_here"], one["cost"]["trained_elsewhere"]) == (0, 2)
    assert one["identity"]["defense"]["config"] == other["identity"]["defense"]["config"]
    assert one["identity"]["defense"]["parts"] != other["identity"]["defense"]["parts"]
    missing = bench("run", "--defense", plugin, "--dataset", TINY, "--set", f"source={tmp_path}", "--out", tmp_path)
    assert missing.code == 2
    assert "has no file 'scale.safetensors'" in missing.err


def test_an_inner_defense_trains_and_merges_within(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    ran = bench("run", "--defense", plugin, "--dataset", TINY, "--set", "inner=lora", "--out", tmp_path / "runs")
    assert ran.code == 0, ran.err
    (info,) = infos(tmp_path / "runs")
    assert info["cost"]["trained_here"] == info["cost"]["trainable_nominal"] + 2 > 2
    assert "lora inside" in info["identity"]["defense"]["parts"]
    wrong = bench("run", "--defense", plugin, "--dataset", TINY, "--set", "inner=lorra", "--out", tmp_path)
    assert wrong.code == 2 and "lora" in wrong.err and wrong.err.count("bench: ") == 1
    unsuited = bench("run", "--defense", plugin, "--dataset", TINY, "--set", "inner=none", "--out", tmp_path)
    assert unsuited.code == 2 and "rank" in unsuited.err


class Counter:
    """State that is not a module, as SPSA's."""

    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.total = state["total"]


class Asked:
    """A stand-in for a base that counts queries."""

    queries = 0


def job(folder: Path, base: Any = None) -> loop.TrainingJob:
    data = Split("train", np.arange(50, dtype=np.uint8)[:, None, None, None], np.arange(50), 256)
    return loop.TrainingJob(
        *(data, (), 0.25, objectives.clean, 3, torch.device("cpu"), folder / "checkpoint.pt", lambda *_: None, []),
        base=base,
    )


def run(one: loop.TrainingJob, state: Counter, steps: int, stop: int = 10**9, queries: int = 0) -> int:
    """Sum the draws of each step; return the number of steps. ``stop`` interrupts it as a kill would."""
    done = 0
    for step in one.steps(steps, 4, state, queries=queries):
        if done == stop:
            raise KeyboardInterrupt
        state.total += float(torch.rand(())) + float(step.draw.normal(2).sum()) + float(step.y.sum())
        if one.base is not None:
            one.base.queries += 7
        done += 1
    return done


def test_steps_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    whole, parts = Counter(), Counter()
    assert run(job(tmp_path / "whole"), whole, 20) == 20
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path), Counter(), 20, stop=8)
    assert run(job(tmp_path), parts, 20) == 12
    assert parts.total == whole.total
    assert run(job(tmp_path), parts, 20) == 0  # finished: another process has nothing to do


@pytest.mark.parametrize(("budget", "done"), [(70, 10), (69, 9), (7, 1), (0, 20)])
def test_a_query_budget_is_never_exceeded_but_by_the_first_step(tmp_path: Path, budget: int, done: int) -> None:
    base = Asked()
    assert run(job(tmp_path, base), Counter(), 20, queries=budget) == done
    assert base.queries == 7 * done


def test_the_query_count_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, Asked()), Counter(), 20, stop=8, queries=70)
    base = Asked()
    assert run(job(tmp_path, base), Counter(), 20, queries=70) == 2
    assert base.queries == 70


def test_stages_have_checkpoints_and_seeds_of_their_own(tmp_path: Path) -> None:
    one = job(tmp_path)
    first, second = one.at("first", sigma=0.0), one.at("second")
    assert (first.sigma, second.sigma) == (0.0, 0.25)
    assert len({one.seed, first.seed, second.seed}) == len({one.checkpoint, first.checkpoint, second.checkpoint}) == 3
    steps = list(first.steps(20, 4, nn.Linear(1, 1)))
    with pytest.raises(BenchError, match="diverged"):
        steps[9].report(float("nan"))
