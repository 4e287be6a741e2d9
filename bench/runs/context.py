"""What a defense is built from besides its own code: the base, shared parts, files, other defenses."""

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
from bench.plugin_source import source_sha256
from bench.process import watchdog
from bench.runs.plan import Plan
from bench.runs.settings import configured
from bench.smoothing import noise
from bench.training import loop, objectives
from bench.training.weights import Entry


@dataclass(frozen=True)
class Workshop:
    """What training a part takes. Without one (estimates) parts come untrained."""

    train: Split
    progress: loop.Progress
    most: int | None = None  # steps of each training, at most
    notes: list[str] = field(default_factory=list)  # what the defense states; it may be built more than once


class BuildContext:
    """Satisfies ``interface.Context`` and keeps account of all that was handed out."""

    def __init__(
        self, plan: Plan, base: BaseModel, access: Access, device: torch.device, workshop: Workshop | None
    ) -> None:
        self.base: Base = base.view(access)
        self.classes, self.shape = len(plan.card.classes), plan.card.shape
        self.asked_train_sigma = False
        self._torch = globalstate.torch_settings()
        self.used: dict[str, str] = {}  # name -> sha256 of what decides the defense beside its config and base
        self.sources: list[str] = []  # hub ids and folders that files were taken from
        self.commits: dict[str, str] = {}  # hub id -> the commit that its files are of
        self.parts: list[nn.Module] = []
        self.part_seconds = 0.0
        self._plan, self._device, self._workshop = plan, device, workshop

    def __getstate__(self) -> dict[str, Any]:
        """All but what training takes: a copy, in another process or on another device, only certifies."""
        return self.__dict__ | {"_workshop": None, "_torch": {}}

    @property
    def train_sigma(self) -> float:
        """The noise level of training; that it was asked for is recorded."""
        self.asked_train_sigma = True
        return self._plan.train_sigma

    def once(self, part: Part) -> nn.Module:
        """The part's module, frozen: trained here once, and cached under all that decides it."""
        # Other defenses share the part, so it must not depend on what this one has set.
        with globalstate.using_torch_settings(self._torch):
            with globalstate.fixed_rng(self._plan.seed):
                module = part.build(self.classes, self.shape).to(self._device)
            if self._workshop is not None:
                self._train_or_load(part, module, self._workshop)
        self.parts.append(module)
        return module.eval().requires_grad_(False)

    def _train_or_load(self, part: Part, module: nn.Module, workshop: Workshop) -> None:
        kind, card, seed = type(part), self._plan.card, self._plan.seed
        identity = {
            "part": kind.__qualname__,
            "fields": asdict(part),  # type: ignore[call-overload]
            "source": source_sha256(Path(inspect.getfile(kind))),
            "classes": self.classes,
            "shape": self.shape,
            "train": workshop.train.sha256(),
            "augment": card.augment,
            "seed": seed,
            "noise": noise.VERSION,
            "device": self._device.type,
            "training": loop.SOURCE,
        }
        entry = Entry(f"{card.name}-{kind.__name__.lower()}", identity)
        with entry.lock():
            trained = entry.load()
            if trained is None:
                spent: list[float] = []
                job = loop.TrainingJob(
                    data=workshop.train,
                    augment=card.augment,
                    sigma=0.0,
                    objective=objectives.clean,
                    seed=seed,
                    device=self._device,
                    checkpoint=entry.checkpoint,
                    progress=workshop.progress,
                    spent=spent,
                    most=workshop.most,
                )
                with globalstate.fixed_rng(seed):
                    part.fit(module, job)
                trained = entry.save(module.state_dict(), {"train_seconds": sum(spent)})
        module.load_state_dict(trained.state)
        self.used[f"{kind.__name__} {digest(identity)[:8]}"] = trained.sha256
        self.part_seconds += trained.meta["train_seconds"]

    def hub(self, source: str, filename: str) -> Path:
        """One file of a folder or of a hub repository, its hash recorded."""
        if Path(source).is_dir():
            path = Path(source) / filename
            if not path.is_file():
                raise MissingFile(f"{source} has no file {filename!r}")
        else:
            repo, _, revision = source.partition("@")
            # All files of one commit, whatever is pushed between two of them.
            at = self.commits.get(source) or revision or "main"
            with watchdog.paused():
                path = hub.fetch(repo, filename, at, "model", f"or give a local folder in place of {repo}")
            self.commits[source] = hub.commit(path)
        sha256 = file_sha256(path)
        self.used[f"{filename} {sha256[:8]}"] = sha256  # two sources may have files of one name
        if source not in self.sources:
            self.sources.append(source)
        return path

    def inner(self, name: str, **config: Any) -> Defense:
        """Another defense on the same base, with the same parts and seed."""
        cls, source = plugins.load(name)
        made = configured(name, cls, self._plan.preset, self._plan.card, config)
        if cls.needs(made) > self.base.most:
            raise BenchError(f"{name} inside a defense of {self.base.most.name} access needs {cls.needs(made).name}")
        self.used[f"{name} inside"] = digest({"source": source, "config": asdict(made)})
        return cls(self, made)

    def note(self, text: str) -> None:
        """State something once in the run's first lines and in its record; estimates do not repeat it."""
        if self._workshop is not None and text not in self._workshop.notes:
            self._workshop.notes.append(text)
            note(text)
