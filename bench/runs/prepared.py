"""A run before its first vote: everything that certification needs, built once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench import plugins
from bench.data.split import Split
from bench.models.base import BaseModel
from bench.process import environment
from bench.process.runlog import log
from bench.records import schema
from bench.records.schema import Identity, RunInfo
from bench.runs.certifier import Certifier
from bench.runs.costs import TrainingCost
from bench.runs.fitting import Fitted
from bench.runs.identity import make_task
from bench.runs.plan import SCHEDULE, Plan
from bench.runs.splits import Splits
from bench.smoothing.noise import Noise
from bench.smoothing.task import Task


@dataclass(frozen=True)
class Materials:
    """The splits and the base classifier, which several runs of one command share."""

    train: Split
    validation: Split
    splits: Splits
    base: BaseModel

    def trained_on(self, plan: Plan) -> Split:
        """Return the images that the plan's defense is trained on."""
        return plan.training_images(self.train, self.validation)

    def certified(self, plan: Plan) -> Split:
        """Return the split whose images the plan certifies."""
        return self.splits.certified(plan)


@dataclass(frozen=True)
class RunHeader:
    """What the record of a run states before its first certificate. It can be sent to another process."""

    plan: Plan  # with its searched settings chosen
    name: str  # of the run's folder, without its hash
    info: RunInfo  # run.json before the first vote
    training_cost: TrainingCost

    @property
    def defense(self) -> str:
        """The short name of the defense."""
        return plugins.short_name(self.plan.defense)

    @property
    def rows(self) -> int:
        """Rows of a block."""
        assert self.info.identity.block is not None
        return self.info.identity.block[0]

    def task(self, split: Split, device: torch.device, noise: Noise | None = None) -> Task:
        """Make the run's task, in the blocks of its identity; ``noise`` replaces the run's own."""
        return make_task(self.plan, split, device, noise, self.rows)


@dataclass(frozen=True)
class PreparedRun:
    """A trained run: its plan, data, identity, task and certifier."""

    plan: Plan  # with its searched settings chosen
    name: str  # of the run's folder, without its hash
    tried: list[dict[str, Any]]  # candidates of the search and their scores
    materials: Materials
    fitted: Fitted
    identity: Identity
    task: Task

    @property
    def indices(self) -> list[int]:
        """The images of the whole run."""
        return self.identity.indices

    @property
    def split(self) -> Split:
        """The split whose images are certified."""
        return self.materials.certified(self.plan)

    def fresh_task(self, noise: Noise) -> Task:
        """Make the run's task with other noise."""
        return make_task(self.plan, self.split, self.task.device, noise, self.task.block)

    @property
    def certifier(self) -> Certifier:
        """The classifier that is certified."""
        return Certifier(self.plan.defense, self.fitted.defense, self.materials.base, self.plan.arithmetic)

    def warn_of_unused_options(self) -> None:
        """Log the options of training that had no effect, as training has shown."""
        plan = self.plan
        if plan.objective != "gaussian" and self.identity.defense.objective is None:
            log.warning(
                "--objective %s has no effect on %s: its training does not use it", plan.objective, plan.defense
            )
        if self.identity.train_sigma not in (None, plan.train_sigma):
            log.warning("--train-sigma %g has no effect on %s: it trains nothing", plan.train_sigma, plan.defense)

    def _data(self) -> dict[str, Any]:
        """Describe where the images are and, where the data name domains, how many of each were used."""
        trained_on = self.materials.trained_on(self.plan)
        found: dict[str, Any] = {"train": trained_on.origin}
        if self.plan.split != "train":
            found[self.plan.split] = self.split.origin
        if domains := self.split.domain_counts(self.indices):
            found["domains"] = {"trained_on": trained_on.domain_counts(), "certified": domains}
        return found

    def header(self, begun: bool = False) -> RunHeader:
        """Collect what the record states; certifies nothing, but measures the base's accuracy without noise.

        That is left out where the run has ``begun``, since its record has it already.
        """
        plan, fitted, base = self.plan, self.fitted, self.materials.base
        correct = None  # of a base with other classes or without training it means nothing
        if not begun and base.classes == len(plan.card.classes) and not base.untrained_weights:
            correct, _ = base.accuracy(self.split, self.indices)
        brought = None
        if plan.weights:
            brought = fitted.sha256 if fitted.given else base.meta.get("source", {}).get("sha256")
        elsewhere = [f"{plan.weights.absolute().name} ({brought:.8})"] if plan.weights and brought else []
        settings = {k: v for k, v in plan.changed.items() if not (fitted.given and k in SCHEDULE)}
        about = {
            "environment": environment.describe(self.task.device),
            "arguments": plan.options.record(),
            "radii": list(plan.radii),
            "preset": plan.preset,
            "classes": list(plan.card.classes),
            "data": self._data(),
            "base": {"clean_correct": correct, "images": len(self.indices), **base.meta},
            "defense": {
                "family": plan.cls.family,
                "trains": plan.cls.kind(plan.config),
                "paper": plan.cls.paper,
                "access": plan.cls.needs(plan.config).name,
                "trained_elsewhere": [*fitted.sources, *elsewhere],
                "commits": fitted.commits,
                "settings": settings,
                "search": self.tried,
                "weights_file": plan.weights and plan.weights.absolute().name,
                "weights_sha256": brought,
                "notes": fitted.notes,
            },
        }
        step = plan.step_cost if self.identity.defense.objective is not None else None
        cost = TrainingCost(
            train_seconds=fitted.train_seconds,
            queries=fitted.queries,
            trainable_nominal=fitted.nominal,
            trainable_updated=fitted.updated,
            trained_here=fitted.here,
            trained_elsewhere=fitted.elsewhere,
            step_forwards=step.forwards if step else None,
            step_backwards=step.backwards if step else None,
        )
        return RunHeader(plan, self.name, schema.started(self.identity, about), cost)
