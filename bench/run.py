"""One run, start to finish: base, defense, engine, record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from bench import environment, fitting, gridnoise, noise, registry, search
from bench.anytime import describe
from bench.base import BaseModel, LocalBase
from bench.bases import load_base, untrained_base
from bench.cards import Split, choose, load_splits
from bench.certification import Certifier, Filling, Ready, measure
from bench.certify import Task, block_rows, certify, check_rows
from bench.interface import Defense
from bench.noise import Noise
from bench.plan import Plan
from bench.store import Record, read_run


class Reporter(Protocol):
    """Where a run says what it is doing."""

    def say(self, text: str) -> None:
        """One finished fact."""
        ...

    def training(self, what: str) -> Any:
        """A context whose value is called with (steps done, steps, loss)."""
        ...

    def certifying(self, what: str, total: int, done: int) -> Any:
        """A context whose value is called with (images done, correct so far)."""
        ...


@dataclass(frozen=True)
class _Materials:
    """What several runs of one command share."""

    train: Split
    validation: Split
    test: Split
    base: BaseModel


class Session:
    """The runs of one command: data and base classifiers are loaded once and shared."""

    def __init__(
        self, device: torch.device, out: Path, reporter: Reporter, devices: Sequence[torch.device] = ()
    ) -> None:
        """``devices``: all that share the certification, ``device`` first; the rest is done on it alone."""
        self.device, self.out, self.reporter = device, out, reporter
        self.devices = list(devices) or [device]
        self._materials: dict[tuple[str, str, str, Path | None, bool], _Materials] = {}
        self._splits: dict[str, list[Split]] = {}

    def materials(self, plan: Plan) -> _Materials:
        """Splits and base of a plan; the base is trained here if it never was."""
        weights = self._base_weights(plan)
        probe = not plan.cls.adapts
        key = (plan.card.name, plan.preset, plan.base, weights, probe)
        if key not in self._materials:
            if plan.card.name not in self._splits:
                self._splits[plan.card.name] = load_splits(plan.card, "train", "validation", "test")
            train, validation, test = self._splits[plan.card.name]
            train = train.first(plan.card.presets[plan.preset].train_examples)
            with self.reporter.training(f"base {plan.base}") as progress:
                base = load_base(plan.card, plan.base, train, validation, self.device, progress, weights, probe)
            self._materials[key] = _Materials(train, validation, test, base)
        return self._materials[key]

    def _base_weights(self, plan: Plan) -> Path | None:
        """The plan's ``--weights`` where they are the base's: where its defense has no weights of its own."""
        if plan.weights is None:
            return None
        rough = fitting.construct(plan, self._untrained_base(plan), self.device)
        return None if fitting.trains(rough) else plan.weights

    def _untrained_base(self, plan: Plan) -> BaseModel:
        return untrained_base(plan.card, plan.base, self.device, probe=not plan.cls.adapts)

    def searched(self, plan: Plan) -> tuple[Plan, list[dict[str, Any]]]:
        """The plan with its searched settings chosen, and how each candidate did; unchanged without a search."""
        if not plan.candidates:
            return plan, []
        shared = self.materials(plan)
        name = f"{len(plan.candidates)} candidates of {registry.short_name(plan.defense)}"
        task = make_task(plan, shared.validation, self.device)
        with self.reporter.training(name) as progress, steady():
            return search.best(plan, shared.base, shared.train, task, len(shared.validation), progress)

    def prepare(self, plan: Plan) -> tuple[dict[str, Any], Task, fitting.Fitted]:
        """The identity of a plan's run, its task, and its defense, trained here if it never was."""
        shared = self.materials(plan)
        with self.reporter.training(f"{registry.short_name(plan.defense)} at sigma {plan.train_sigma:g}") as progress:
            fitted = fitting.fit(plan, shared.base, shared.train, self.device, progress)
        task = make_task(plan, shared.test, self.device)
        indices = choose(shared.test, plan.examples)
        return self._identity(plan, shared, fitted, indices, task), task, fitted

    def ready(self, plan: Plan) -> tuple[Ready, Certifier]:
        """All of a plan's run that comes before its first vote, and what is to be certified."""
        plan, tried = self.searched(plan)
        identity, _, fitted = self.prepare(plan)
        shared, indices = self.materials(plan), identity["indices"]
        right = None  # a base of other classes is neither right nor wrong
        if shared.base.classes == len(plan.card.classes):
            right, _ = shared.base.accuracy(shared.test, indices)
        extra = {
            "environment": environment.describe(self.device),
            "arguments": plan.arguments,
            "radii": list(plan.card.radii),
            "preset": plan.preset,
            "classes": list(plan.card.classes),
            "data": {"train": shared.train.origin, "test": shared.test.origin},
            "base": {"clean_correct": right, "images": len(indices), **shared.base.meta},
            "defense": {
                "family": plan.cls.kind(plan.config),
                "paper": plan.cls.paper,
                "access": plan.cls.needs(plan.config).name,
                "trained_elsewhere": fitted.sources,
                "settings": plan.changed,
                "search": tried,
                "weights_file": plan.weights and plan.weights.name,
            },
        }
        cost = {
            "train_seconds": fitted.train_seconds,
            "queries": fitted.queries,
            "trainable_nominal": fitted.nominal,
            "trainable_updated": fitted.updated,
            "trained_here": fitted.here,
            "trained_elsewhere": fitted.elsewhere,
        }
        return Ready(plan, identity, extra, cost), Certifier(plan.defense, fitted.defense, shared.base)

    def run(self, plan: Plan) -> Record:
        """Do the run, or what is left of it. Every image is on disk as soon as it is certified."""
        ready, certifier = self.ready(plan)
        filling = Filling(self.out, ready, self.reporter)
        try:
            if not filling.complete:
                self._certify(ready, certifier, filling)
        finally:
            filling.close()
        return read_run(filling.record.path)

    def _certify(self, ready: Ready, certifier: Certifier, filling: Filling) -> None:
        task, index = make_task(ready.plan, self.materials(ready.plan).test, self.device), ready.identity["indices"][0]
        for device in self.devices:
            environment.reset_peak_memory(device)
        with steady(), torch.inference_mode():
            measured = measure(certifier, task, index, calibrate=not filling.resumed)
            more = self.devices[1:] if isinstance(certifier.base, LocalBase) else []
            others = [certifier.replica(task, device) for device in more]
            for model, there in others:
                check_rows(model, there, index)
            filling.announce(measured.block_seconds / task.block / (1 + len(others)))
            with filling.progress() as progress:
                progress(*filling.so_far)
                for certificate in certify(certifier.logits, task, filling.start, filling.left, others):
                    filling.add(certificate)
                    progress(*filling.so_far)
        certifier.base.check_unchanged(ready.plan.defense)
        filling.finish(measured, max(map(environment.peak_memory, self.devices)))

    def estimate(self, plan: Plan) -> dict[str, Any]:
        """What a run would cost: its votes, and seconds by timing the untrained defense on this machine."""
        test, train = load_splits(plan.card, "test", "train")
        base = self._untrained_base(plan)
        defense = fitting.construct(plan, base, self.device)
        task, indices = make_task(plan, test, self.device), choose(test, plan.examples)
        with steady(), torch.inference_mode():
            per_vote = check_rows(defense, task, indices[0]) / task.block
        votes = len(indices) * plan.procedure.most
        # A training step's backward pass costs about twice its forward pass.
        trainings = 0 if plan.weights else max(1, len(plan.candidates))
        epochs = trainings * getattr(defense.schedule(), "epochs", 0.0)
        queries = trainings * getattr(plan.config, "queries", 0)
        images = epochs * len(train.first(plan.card.presets[plan.preset].train_examples))
        return {
            "run": f"{plan.card.name}-{registry.short_name(plan.defense)}-s{plan.sigma:g}",
            "seed": plan.seed,
            "images": len(indices),
            "votes": votes,
            "seconds": votes * per_vote,
            "train_seconds": (3 * images + queries) * per_vote,
        }

    def _identity(
        self, plan: Plan, shared: _Materials, fitted: fitting.Fitted, indices: list[int], task: Task
    ) -> dict[str, Any]:
        uses_objective = fitted.sha256 and plan.weights is None and plan.cls.loss is Defense.loss
        return {
            "dataset": plan.card.name,
            "card": plan.card.sha256(),
            "split": shared.test.name,
            "indices": indices,
            "images": shared.test.sha256(indices),
            "base": shared.base.identity(),
            "defense": {
                "name": registry.short_name(plan.defense),
                "source": plan.source,
                "config": asdict(plan.config),
                "weights": fitted.sha256,
                "parts": fitted.parts,
                "objective": plan.objective if uses_objective else None,
            },
            "train_sigma": plan.train_sigma,
            "sigma": plan.sigma,
            "noise": noise_identity(plan),
            "procedure": describe(plan.procedure),
            "bound": "clopper-pearson",
            "seed": plan.seed,
            "block": [task.block, *task.shape],
            "dtype": "float32",
            "device": self.device.type,
        }


def make_task(plan: Plan, test: Split, device: torch.device) -> Task:
    """What the engine is given of a plan."""
    source = Noise(plan.seed, test.name)
    images: Callable[[list[int]], NDArray[Any]] = test.pixels
    noisy = noise.add_float(source, plan.sigma)
    if plan.noise == "grid":
        images, noisy = test.integers, gridnoise.GridNoise(source, plan.sigma, plan.card.levels).inputs
    return Task(
        images=images,
        labels=lambda i: int(test.labels[i]),
        noisy=noisy,
        shape=plan.card.shape,
        classes=len(plan.card.classes),
        sigma=plan.sigma,
        noise=source,
        block=block_rows(plan.card.shape, device),
        device=device,
    )


def noise_identity(plan: Plan) -> dict[str, Any]:
    """The kind of noise, and for grid noise what its sampling error costs the bound (``tau``)."""
    found: dict[str, Any] = {"kind": plan.noise, "version": noise.VERSION, "tau": 0.0}
    if plan.noise == "grid":
        tau = gridnoise.tau(plan.sigma, plan.card.levels, math.prod(plan.card.shape))
        found |= {"grid_version": gridnoise.VERSION, "levels": plan.card.levels, "tau": tau}
    return found


@contextmanager
def steady() -> Iterator[None]:
    """Arithmetic that is the same at every call: no TF32, no algorithm chosen by timing."""
    benchmark = torch.backends.cudnn.benchmark
    tf32 = torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32
        torch.set_float32_matmul_precision(precision)
