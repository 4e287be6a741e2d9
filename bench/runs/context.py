"""The context a defense is built in: its base, shared parts, files and inner defenses."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import globalstate, plugins
from bench.data.split import Split
from bench.errors import BenchError, note
from bench.interface import Access, Base, Defense, Part
from bench.io import hub
from bench.io.files import digest, file_sha256
from bench.io.hub import MissingFile
from bench.models.base import BaseModel
from bench.process import watchdog
from bench.runs.plan import Plan
from bench.runs.settings import configured
from bench.smoothing import noise
from bench.training import bfloat16, loop, objectives, versions
from bench.training.weights import Weights, cached_training


@dataclass(frozen=True)
class PartTraining:
    """What is needed to train shared parts. Without it, as in estimates, parts stay untrained."""

    train: Split
    progress: loop.Progress
    most: int | None = None  # maximum steps of each training
    notes: list[str] = field(default_factory=list)  # the defense's notes, each once, however often it is built


class BuildContext:
    """The harness's ``interface.Context``, which records everything a defense takes from it."""

    def __init__(
        self, plan: Plan, base: BaseModel, access: Access, device: torch.device, training: PartTraining | None
    ) -> None:
        self.base: Base = base.view(access)
        self.classes, self.shape = len(plan.card.classes), plan.card.shape
        self.asked_train_sigma = False
        self._torch = globalstate.torch_settings()
        self.used: dict[str, str] = {}  # name -> sha256 of a part, file or inner defense
        self.versions: dict[str, int] = {}  # of the training code that inner defenses use
        self.sources: list[str] = []  # hub ids and folders that files were taken from
        self.commits: dict[str, str] = {}  # hub id -> the commit of its files
        self.parts: list[nn.Module] = []
        self.part_seconds = 0.0
        self.part_arithmetic: set[str] = set()  # that parts were trained in
        self._plan, self._device, self._training = plan, device, training

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only training needs: a copy, in another process or on another device, only certifies."""
        return self.__dict__ | {"_training": None, "_torch": {}}

    @property
    def notes(self) -> list[str]:
        """The notes so far."""
        return [] if self._training is None else self._training.notes

    @property
    def train_sigma(self) -> float:
        """The noise level of training. Reading it is recorded."""
        self.asked_train_sigma = True
        return self._plan.train_sigma

    def once(self, part: Part) -> nn.Module:
        """Return the part's module, frozen: trained once, and cached under everything that decides it."""
        with globalstate.using_torch_settings(
            self._torch
        ):  # other defenses share the part, so this one's settings must not affect it
            with globalstate.fixed_rng(self._plan.seed):
                module = part.build(self.classes, self.shape).to(self._device)
            if self._training is not None:
                self._train_or_load(part, module, self._training)
        self.parts.append(module)
        return module.eval().requires_grad_(False)

    def _train_or_load(self, part: Part, module: nn.Module, training: PartTraining) -> None:
        kind, card, seed = type(part), self._plan.card, self._plan.seed
        builtin = kind.__module__.startswith(versions.PACKAGE)
        identity = {
            "part": kind.__qualname__,
            "fields": asdict(part),  # type: ignore[call-overload]
            # A part of certbench's own is identified by its version alone.
            "source": None if builtin else plugins.source_sha256(Path(inspect.getfile(kind))),
            "classes": self.classes,
            "shape": self.shape,
            "train": training.train.sha256(),
            "augment": card.augment,
            "seed": seed,
            "noise": noise.VERSION,
            "device": self._device.type,
            "versions": versions.used_by(kind, "clean") | versions.of_arithmetic(self._plan.training_arithmetic),
        }

        def train(checkpoint: Path) -> Weights:
            job = loop.TrainingJob(
                data=training.train,
                augment=card.augment,
                sigma=0.0,
                objective=bfloat16.logits_alone(objectives.clean),
                seed=seed,
                device=self._device,
                checkpoint=checkpoint,
                progress=training.progress,
                most=training.most,
                arithmetic=self._plan.training_arithmetic,
            )
            with globalstate.fixed_rng(seed):
                part.fit(module, job)
            return module.state_dict(), {"train_seconds": job.seconds, "arithmetic": sorted(job.used)}

        trained = cached_training(f"{card.name}-{kind.__name__.lower()}", identity, train)
        module.load_state_dict(trained.state)
        self.used[f"{kind.__name__} {digest(identity)[:8]}"] = trained.sha256
        self.part_seconds += trained.meta["train_seconds"]
        self.part_arithmetic |= set(trained.meta.get("arithmetic", []))

    def hub(self, source: str, filename: str = "") -> Path:
        """Return the path of a file, or of one in a folder or a hub repository; record its hash."""
        if not filename:
            path = Path(source)
            if not path.is_file():
                raise MissingFile(f"no file {source}")
            source = filename = path.name
        elif Path(source).is_dir():
            path = Path(source) / filename
            if not path.is_file():
                raise MissingFile(f"{source} has no file {filename!r}")
        else:
            repo, _, revision = source.partition("@")
            # All files come from one commit, even if another is pushed meanwhile.
            at = self.commits.get(source) or revision or "main"
            with watchdog.paused():
                path = hub.fetch(repo, filename, at, "model", f"or give a local folder in place of {repo}")
            self.commits[source] = hub.commit(path)
        sha256 = file_sha256(path)
        self.used[f"{filename} {sha256[:8]}"] = sha256  # two sources may have files of the same name
        if source not in self.sources:
            self.sources.append(source)
        return path

    def inner(self, name: str, **config: Any) -> Defense:
        """Build another defense on the same base, with the same parts and seed."""
        cls, source = plugins.load(name)
        made = configured(name, cls, self._plan.preset, self._plan.card, config)
        if cls.needs(made) > self.base.most:
            raise BenchError(
                f"{name} needs {cls.needs(made).name} access, and the defense that contains it declares only "
                f"{self.base.most.name}; declare access = Access.{cls.needs(made).name}"
            )
        self.versions |= versions.used_by(cls, self._plan.objective)
        self.used[f"{name} inside"] = digest({"source": source, "config": asdict(made)})
        return cls(self, made)

    def note(self, text: str) -> None:
        """Print a note once, among the run's first lines, and record it; estimates do not print it."""
        if self._training is not None and text not in self._training.notes:
            self._training.notes.append(text)
            note(text)
