"""What is sent to a worker: a defense and its base, packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.data.datasets import load_splits
from bench.models.load import untrained_base
from bench.options import RunOptions
from bench.plugins import names
from bench.runs import fitting
from bench.runs.certifier import Certifier
from bench.runs.context import PartTraining
from bench.runs.identity import make_task
from bench.runs.plan import make_plans
from tests.helpers.commands import TINY, defense

pytest.importorskip("ray")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*names(), defense("randomised")])
def test_every_defense_can_be_sent_to_a_worker(name: str) -> None:
    """With the base that it queries, and without the training data."""
    from bench.cluster.worker import pack, unpack

    (plan,) = make_plans(RunOptions(defenses=name, dataset=TINY))
    base = untrained_base(plan.card, plan.base, CPU, probe=not plan.cls.adapts)
    train, test = load_splits(plan.card, "train", "test")
    built = fitting.construct(plan, base, CPU)
    built.context._training = PartTraining(train, lambda *_: None)  # type: ignore[attr-defined]
    built.merge()
    here = Certifier(name, built.eval(), base)
    task = make_task(plan, test, CPU)
    packed = pack(here), pack(replace(task, images=None, labels=None))  # type: ignore[arg-type]
    assert sum(map(len, packed)) < 5e6
    there, their_task = map(unpack, packed)
    with torch.inference_mode():
        logits = [
            t.logits(c.model(CPU), task.image(0), t.rows("estimate", 0)) for c, t in ((here, task), (there, their_task))
        ]
    assert torch.equal(*logits)
