"""Check that a defense follows the interface, and explain how to fix it (``bench doctor``).

The tests run the same checks over every built-in defense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.data.datasets import choose, load_splits
from bench.errors import BenchError, one_line
from bench.interface import Schedule
from bench.io.files import scratch_cache
from bench.models.arithmetic import deterministic
from bench.models.load import untrained_base
from bench.models.names import Given
from bench.process.runlog import log
from bench.records.findings import Finding
from bench.runs import fitting
from bench.runs.certifier import Certifier, independent
from bench.runs.context import PartTraining
from bench.runs.identity import make_task
from bench.runs.plan import Plan
from bench.smoothing.blocks import check_logits
from bench.smoothing.engine import Device, certify
from bench.smoothing.fixed import Fixed
from bench.smoothing.rowcheck import check_rows
from bench.smoothing.task import Task
from bench.smoothing.votes import Certificate

STEPS = 3


def examine(plan: Plan) -> Iterator[Finding]:
    """Run the checks in order, on the plan's card with an untrained base, up to the first problem."""
    device = torch.device("cpu")
    train, test = load_splits(plan.card, "train", plan.split)
    train = train.first(200)
    config, steps = plan.config, ""
    if isinstance(config, Schedule):
        steps = f" for {STEPS} steps"
        config = replace(config, batch=16, epochs=STEPS * 16 / len(train))
    plan = replace(plan, config=config)
    given = Given(normalisation=plan.normalisation)
    base = untrained_base(plan.card, plan.base, device, not plan.cls.adapts, given)
    task = replace(make_task(plan, test, device), block=64)

    failed = ""
    try:
        # A cache of its own, so that training really happens.
        with scratch_cache(), fitting.attribute_errors(plan.defense, "under examination"), deterministic():
            failed = "could not be built with its access to the base"
            # Shared parts are trained, as in a run: an untrained one would make another defense of the loaded one.
            defense = fitting.construct(plan, base, device, PartTraining(train, lambda *_: None, STEPS))
            yield Finding("is built, and asks the base for no more than its access")

            failed = f"could not train{steps}"
            if fitting.trains(defense):
                fitting.train_or_load(plan, base, train, device, lambda *_: None, defense, STEPS)
            yield Finding(f"trains{steps}")

            failed = "could not merge it without changing its logits"
            # A few steps change little: a merge that loses what they changed shows once all of it has moved.
            _move(moved := fitting.construct(plan, base, device, PartTraining(train, lambda *_: None, STEPS)))
            fitting.merge(moved, train, plan, device)
            fitting.merge(defense, train, plan, device)
            yield Finding("merging it leaves its logits as they were trained")

            failed = "could not show that its logits depend on each image and its draw alone"
            with torch.inference_mode():
                check_rows(defense, task, 0)
            yield Finding("its logits are a function of each image and its draw alone")

            failed = "could not reload it as the same function, on an unchanged base"
            loaded = fitting.fit(plan, base, train, device, lambda *_: None).defense
            if not _same_logits(defense, loaded, task):
                raise BenchError(_RELOAD)
            yield Finding("stored and loaded it gives the same logits to the last bit, and the base is unchanged")

            failed = "copies of it in two threads disturb each other"
            if not _copies_are_independent(Certifier(plan.defense, loaded, base), task):
                raise BenchError(
                    "they change one another's logits, so bench run would draw its votes in one thread; keep no buffer "
                    "at the level of a module or a class"
                )
            yield Finding("copies of it in two threads give the logits that each gives alone")

            failed = "could not certify with the same counts in any order"
            images = choose(test, "4")
            if _counts(loaded, task, images) != _counts(loaded, task, images[::-1]):
                raise BenchError("the counts changed with the order of the images")
            yield Finding("certifies, with the same counts in any order")
    except BenchError as e:
        yield Finding(failed, str(e))


def _copies_are_independent(certifier: Certifier, task: Task) -> bool:
    """Test copies in two threads. True also where it cannot be copied: its votes are then drawn in one thread."""
    try:
        models = [certifier.model(task.device), certifier.copy(share_weights=True).model(task.device)]
    except Exception as e:
        log.info("%s votes in one thread: %s", certifier.name, one_line(e))
        return True
    return independent([partial(check_logits, model, task, 0, number) for number, model in enumerate(models)])


def _move(defense: torch.nn.Module) -> None:
    """Change all that would be trained, each tensor by a tenth of its size or, where it is zero, of a layer's."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (p for p in defense.parameters() if p.requires_grad):
            size = float(p.square().mean().sqrt()) or 1.0
            p.add_((0.1 * size * torch.randn(p.shape, generator=generator)).to(p))


def _counts(defense: torch.nn.Module, task: Task, order: list[int]) -> dict[int, Certificate]:
    fixed = Fixed(n0=20, n=40, alpha=0.001)
    with torch.inference_mode():
        found = certify([Device(task, [defense])], lambda label: fixed.certify(task.sigma, label), order)
        return {c.index: replace(c, seconds=0) for c in found}


_RELOAD = (
    "the trained object and a new one, built and loaded, give different logits: keep everything that training "
    "changes in parameters or buffers made by build()"
)


def _same_logits(one: torch.nn.Module, other: torch.nn.Module, task: Task) -> bool:
    image, rows = task.image(0), task.rows("check", 0)
    with torch.inference_mode():
        return torch.equal(task.logits(one, image, rows), task.logits(other, image, rows))
