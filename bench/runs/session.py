"""One run, start to finish: base, defense, engine, record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import plugins, torchstate
from bench.data.datasets import load_splits
from bench.data.split import Split
from bench.errors import DefenseFault
from bench.io.files import digest
from bench.models import arithmetic
from bench.models.arithmetic import steady
from bench.models.base import BaseModel, LocalBase
from bench.models.bases import load_base, untrained_base
from bench.models.served import is_url
from bench.models.statement import state_base
from bench.process import environment
from bench.process.runlog import STARTED, Logged, Reporter, log, recording, signature
from bench.records import schema
from bench.records.record import Record, read_run
from bench.records.schema import Identity, RunInfo
from bench.records.shards import Shard
from bench.records.writer import run_folder
from bench.runs import fitting, recheck, search
from bench.runs.certifier import Certifier, Drifted, Filling, Ready
from bench.runs.costs import cost_per_vote
from bench.runs.device import Placed, check_apart
from bench.runs.identity import examples, identity, make_task, run_label, run_name
from bench.runs.plan import Plan
from bench.runs.timing import vote_seconds
from bench.smoothing import blocks
from bench.smoothing.engine import Pixels, Task, certify, check_rows
from bench.smoothing.noise import Noise


@dataclass(frozen=True)
class _Materials:
    """What several runs of one command share."""

    train: Split
    validation: Split
    test: Split
    base: BaseModel

    def certified(self, plan: Plan) -> Split:
        """The split of which the plan certifies images."""
        return self.test if plan.split == "test" else self.validation


class Session:
    """The runs of one command: data and base classifiers are loaded once and shared."""

    def __init__(
        self,
        device: torch.device,
        out: Path,
        reporter: Reporter,
        shard: Shard | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        """``devices``: all that share the certification, ``device`` first; the rest is done on it alone."""
        self.devices = list(devices) or [device]
        self.threads = environment.threads(device)
        environment.keep_freed_memory()
        self.device, self.out, self.reporter, self.shard = device, out, Logged(reporter, log.info), shard
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
            state_base(base, validation, self.reporter.say, log.warning)
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
        name = f"{len(plan.candidates)} candidates of {plugins.short_name(plan.defense)}"
        task = make_task(plan, shared.validation, self.device)
        with self.reporter.training(name) as progress:
            return search.best(plan, shared.base, shared.train, task, len(shared.validation), progress)

    def prepare(self, plan: Plan) -> tuple[Identity, Task, fitting.Fitted]:
        """The identity of a plan's run, its task, and its defense, trained here if it never was."""
        shared = self.materials(plan)
        with self.reporter.training(f"{plugins.short_name(plan.defense)} at sigma {plan.train_sigma:g}") as progress:
            fitted = fitting.fit(plan, shared.base, shared.train, self.device, progress)
        if fitted.sha256 and fitted.train_seconds is not None:
            log.info("weights %s, which took %.1f s of training", fitted.sha256[:8], fitted.train_seconds)
        split, name = shared.certified(plan), run_name(plan)
        task, indices = make_task(plan, split, self.device), examples(plan, split)
        largest = identity(plan, shared.base, split, fitted, indices, task)

        def with_rows(rows: int) -> Identity:
            return largest.replace(block=[rows, *task.shape])

        # A run that is begun goes on in its own blocks, whatever fits now.
        folder = self.shard.folder if self.shard else ""
        places = ((rows, run_folder(self.out, name, with_rows(rows))) for rows in blocks.sizes(task.block))
        rows = next((rows for rows, place in places if (place / folder / "run.json").exists()), None)
        if rows is None:
            with steady(), torch.inference_mode(), fitting.blame(plan.defense, "at its first block"):
                rows = blocks.fitting_block(fitted.defense, task, indices[0]).block
            if rows < task.block:
                self.reporter.say(f"{name}: blocks of {rows} rows; {task.block} do not fit into memory")
        return with_rows(rows), replace(task, block=rows), fitted

    def ready(self, plan: Plan) -> tuple[Ready, Certifier]:
        """All of a plan's run that comes before its first vote, and what is certified."""
        words = ["--device", self.device.type, "--out", str(self.out)]
        words += ["--shard", str(self.shard)] if self.shard else []
        versions = ", ".join(f"{k} {v}" for k, v in environment.describe(self.device).items())
        log.info("on %s, %s", versions, signature())
        log.info("%s%s", STARTED, plan.options.command(*words))
        log.info("loading %s and base %s", plan.card.name, plan.base)
        split = self.materials(plan).certified(plan)
        self._shared_out(plan, split)  # raises before anything is trained for a shard without images
        plan, tried = self.searched(plan)
        found, _, fitted = self.prepare(plan)
        if plan.objective != "gaussian" and found.defense.objective is None:
            log.warning("--objective %s has no effect on %s: it trains nothing by it", plan.objective, plan.defense)
        if plan.train_sigma != found.train_sigma:
            log.warning("--train-sigma %g has no effect on %s: it trains nothing", plan.train_sigma, plan.defense)
        certifier = Certifier(plan.defense, fitted.defense, self.materials(plan).base, plan.arithmetic)
        return Ready(plan, self._info(plan, tried, fitted, found), _training_cost(fitted)), certifier

    def _shared_out(self, plan: Plan, split: Split) -> list[int]:
        """The images to certify: those of the plan, or of its shard. Raises BenchError where a shard has none."""
        indices = examples(plan, split)
        return self.shard.part(indices) if self.shard else indices

    def log_file(self, plan: Plan) -> Path:
        """Where a run's log is until the run has a folder."""
        share = f".{self.shard.folder}" if self.shard else ""
        return self.out / f"{run_name(plan)}-{digest(plan.options.record())[:8]}{share}.log"

    def runs(self, plans: Sequence[Plan]) -> Iterator[Record | DefenseFault]:
        """Do all the runs; yields the record of each or, where its defense is at fault, that: the others go on."""
        for plan in plans:
            try:
                yield self.run(plan)
            except DefenseFault as e:
                yield e

    def run(self, plan: Plan) -> Record:
        """Do the run, or what is left of it, or of its shard. Every image is on disk as soon as it is certified."""
        with (
            recording(self.log_file(plan), self.reporter.aloud) as own_log,
            torchstate.kept(plan.defense, "when it certified"),
        ):
            ready, certifier = self.ready(plan)
            whole = run_folder(self.out, run_name(plan), ready.identity)
            if self.shard and (whole / "run.json").exists() and (merged := read_run(whole)).complete:
                own_log.discard()
                self.reporter.aloud.say(f"{whole}: already complete, nothing to do")
                return merged
            filling = Filling(self.out, ready, own_log, self.reporter.aloud, self.shard)
            try:
                if not filling.complete:
                    self._certify(ready, certifier, filling)
            finally:
                filling.close()
            return read_run(filling.record.path, self.shard)

    def _certify(self, ready: Ready, certifier: Certifier, filling: Filling) -> None:
        task = self._task(ready)
        first = Placed(certifier, task, filling.first)
        others = self.devices[1:] if isinstance(certifier.base, LocalBase) else []
        placed = [first, *(first.beside(device) for device in others)]
        for place in placed:
            place.widen(self.threads)
        if others:
            check_apart(placed)
        filling.same_function(first.fingerprint, "this process")
        devices, sample = [place.device for place in placed], recheck.Sample(task.block)
        try:
            with steady(), torch.inference_mode():
                again = list(certify(devices, filling.start, filling.to_redraw()))
                filling.check_redrawn(again, filling.drawn_on(ready.info.environment.as_json()))
            measured = first.measure(calibrate=not filling.resumed)
            filling.announce(measured, len(placed))
            with filling.progress() as update, steady(), torch.inference_mode():
                update(*filling.so_far)
                for certificate in certify(devices, filling.start, filling.left, sample.see):
                    filling.add(certificate)
                    update(*filling.so_far)
            if sample.kept is not None:
                first.check_again(*sample.kept)
            if others:
                check_apart(placed)
            peak = max(place.finish() for place in placed)
            if (last := filling.audit(task.block)) is not None:
                fresh = self._task(ready, recheck.fresh_noise(last))
                hits = recheck.draw(replace(first.device, task=fresh), last, Pixels(fresh))
                filling.check_audit(last, hits)
        except Drifted as e:
            raise filling.refuse(e) from None
        filling.finish(measured, peak)

    def _task(self, ready: Ready, noise: Noise | None = None) -> Task:
        """What the engine is given of a run; ``noise``: in place of the run's own."""
        split = self.materials(ready.plan).certified(ready.plan)
        return replace(make_task(ready.plan, split, self.device, noise), block=ready.rows)

    def _info(self, plan: Plan, tried: list[dict[str, Any]], fitted: fitting.Fitted, identity: Identity) -> RunInfo:
        """Return run.json as it is before the first vote."""
        shared = self.materials(plan)
        right = None  # a base of other classes is neither right nor wrong
        if shared.base.classes == len(plan.card.classes):
            right, _ = shared.base.accuracy(shared.certified(plan), identity.indices)
        about = {
            "environment": environment.describe(self.device),
            "arguments": plan.options.record(),
            "radii": list(plan.card.radii),
            "preset": plan.preset,
            "classes": list(plan.card.classes),
            "data": {"train": shared.train.origin, plan.split: shared.certified(plan).origin},
            "base": {"clean_correct": right, "images": len(identity.indices), **shared.base.meta},
            "defense": {
                "family": plan.cls.family,
                "trains": plan.cls.kind(plan.config),
                "paper": plan.cls.paper,
                "access": plan.cls.needs(plan.config).name,
                "trained_elsewhere": fitted.sources,
                "commits": fitted.commits,
                "settings": plan.changed,
                "search": tried,
                "weights_file": plan.weights and plan.weights.name,
                "notes": fitted.notes,
            },
        }
        return schema.started(identity, about)

    def estimate(self, plan: Plan) -> dict[str, Any]:
        """What a run would cost: its votes, and seconds by timing the untrained defense on this machine."""
        split, train = load_splits(plan.card, plan.split, "train")
        base = self._untrained_base(plan)
        defense = fitting.construct(plan, base, self.device)
        task, indices = make_task(plan, split, self.device), self._shared_out(plan, split)
        with steady(), torch.inference_mode(), fitting.blame(plan.defense, "in the estimate"):
            fitting.merge(defense, train, plan, self.device)  # as it certifies
            model, whole = arithmetic.model(defense, plan.arithmetic, self.device), task.block
            at_once = self.threads if self.device.type == "cpu" else 1
            seconds, rows = (0.0, whole) if is_url(plan.base) else vote_seconds(model, task, indices[0])
            if rows == whole:
                task = blocks.fitting_block(defense, task, indices[0])
                seconds, rows = check_rows(model, task, indices[0]) / task.block, task.block
            per_vote = seconds / at_once
            # A server's operations cannot be counted, so it is not asked again.
            flops = None if is_url(plan.base) else cost_per_vote(defense, replace(task, block=rows), indices[0]).flops
        votes = len(indices) * plan.procedure.most
        # A training step's backward pass costs about twice its forward pass.
        trainings = 0 if plan.weights else max(1, len(plan.candidates))
        epochs = trainings * getattr(defense.schedule(), "epochs", 0.0)
        queries = trainings * getattr(plan.config, "queries", 0)
        images = epochs * len(train.first(plan.card.presets[plan.preset].train_examples))
        return {
            "run": run_name(plan),
            "label": run_label(plan),
            "seed": plan.seed,
            "images": len(indices),
            "votes": votes,
            "flops_per_vote": flops,
            "timed_rows": rows,
            "block": task.block,
            "seconds": votes * per_vote,
            "train_seconds": (3 * images + queries) * per_vote,
        }


def _training_cost(fitted: fitting.Fitted) -> dict[str, Any]:
    """What a record says of the training's cost."""
    return {
        "train_seconds": fitted.train_seconds,
        "queries": fitted.queries,
        "trainable_nominal": fitted.nominal,
        "trainable_updated": fitted.updated,
        "trained_here": fitted.here,
        "trained_elsewhere": fitted.elsewhere,
    }
