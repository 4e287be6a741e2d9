"""One run, start to finish: base, defense, engine, record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bench import arithmetic, blocks, environment, fitting, gridnoise, metrics, noise, registry, search
from bench.anytime import describe
from bench.base import BaseModel, LocalBase
from bench.bases import load_base, untrained_base
from bench.cache import digest
from bench.cards import Split, choose, load_splits
from bench.certification import Certifier, Ready
from bench.certify import Task, block_rows, certify, check_rows
from bench.console import duration
from bench.costs import cost_per_vote, distinct
from bench.errors import DefenseFault
from bench.http_base import is_url
from bench.interface import Defense, Draw
from bench.noise import Noise
from bench.plan import Plan, command
from bench.procedures import Procedure
from bench.runlog import STARTED, Logged, Reporter, RunLog, log, recording
from bench.shards import Shard
from bench.store import Record, Run, read_run, run_folder

DRIFT = (
    "other logits at the end of the run than at its start for the same image and draw: it keeps a state, so nothing "
    "that it certified holds; set aside"
)


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
        self.device, self.out, self.reporter, self.shard = device, out, Logged(reporter), shard
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
        if fitted.sha256:
            log.info("weights %s, which took %.1f s of training", fitted.sha256[:8], fitted.train_seconds)
        split = shared.certified(plan)
        task, indices = make_task(plan, split, self.device), examples(plan, split)
        largest = self._identity(plan, shared, fitted, indices, task)

        def identity(rows: int) -> dict[str, Any]:
            return largest | {"block": [rows, *task.shape]}

        # A run that is begun goes on in its own blocks, whatever fits now.
        folder = self.shard.folder if self.shard else ""
        places = ((rows, run_folder(self.out, _name(plan), identity(rows))) for rows in blocks.sizes(task.block))
        rows = next((rows for rows, place in places if (place / folder / "run.json").exists()), None)
        if rows is None:
            with steady(), torch.inference_mode(), fitting.blame(plan.defense, "at its first block"):
                rows = blocks.fitting_block(fitted.defense, task, indices[0]).block
            if rows < task.block:
                self.reporter.say(f"{_name(plan)}: blocks of {rows} rows; {task.block} do not fit into memory")
        return identity(rows), replace(task, block=rows), fitted

    def run(self, plan: Plan) -> Record:
        """Do the run, or what is left of it, or of its shard. Every image is on disk as soon as it is certified."""
        name = f"{_name(plan)}-{digest(plan.arguments)[:8]}"
        name += f".{self.shard.folder}" if self.shard else ""
        with recording(self.out / f"{name}.log", self.reporter.aloud) as own_log:
            return self._run(plan, own_log)

    def _run(self, plan: Plan, own_log: RunLog) -> Record:
        here = environment.describe(self.device)
        words = ["--device", self.device.type, "--out", str(self.out)]
        words += ["--shard", str(self.shard)] if self.shard else []
        log.info("on %s", ", ".join(f"{k} {v}" for k, v in here.items()))
        log.info("%s%s", STARTED, command(plan.arguments, *words))
        log.info("loading %s and base %s", plan.card.name, plan.base)
        self._indices(plan, self.materials(plan).certified(plan))
        plan, tried = self.searched(plan)
        identity, task, fitted = self.prepare(plan)
        shared, indices = self.materials(plan), identity["indices"]
        whole = run_folder(self.out, _name(plan), identity)
        if self.shard and (whole / "run.json").exists() and (merged := read_run(whole)).complete:
            own_log.discard()
            self.reporter.say(f"{whole}: already complete, nothing to do")
            return merged
        extra = self._extra(plan, tried, fitted, indices)
        record = Run(self.out, _name(plan), identity, extra, self.shard)
        try:
            if record.info["status"] == "complete":
                own_log.discard()
                self.reporter.say(f"{record.path}: already complete, nothing to do")
            else:
                own_log.move_into(record.path)
                mine = self._indices(plan, shared.certified(plan))
                if record.done:
                    log.info("resumed: %d of %d images are done", len(record.done), len(mine))
                self._certify(plan, fitted, task, mine, record)
                log.info("finished: %d images", len(record.done))
        finally:
            record.close()
        return read_run(record.path, self.shard)

    def _extra(
        self, plan: Plan, tried: list[dict[str, Any]], fitted: fitting.Fitted, indices: list[int]
    ) -> dict[str, Any]:
        """What a record says beside its identity."""
        shared = self.materials(plan)
        right = None  # a base of other classes is neither right nor wrong
        if shared.base.classes == len(plan.card.classes):
            right, _ = shared.base.accuracy(shared.certified(plan), indices)
        return {
            "environment": environment.describe(self.device),
            "arguments": plan.arguments,
            "radii": list(plan.card.radii),
            "preset": plan.preset,
            "classes": list(plan.card.classes),
            "data": {"train": shared.train.origin, plan.split: shared.certified(plan).origin},
            "base": {"clean_correct": right, "images": len(indices), **shared.base.meta},
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
            },
        }

    def ready(self, plan: Plan) -> tuple[Ready, Certifier]:
        """All of a plan's run that comes before its first vote, and what is certified: for another process."""
        plan, tried = self.searched(plan)
        identity, _, fitted = self.prepare(plan)
        extra = self._extra(plan, tried, fitted, identity["indices"])
        certifier = Certifier(plan.defense, fitted.defense, self.materials(plan).base, plan.arithmetic)
        return Ready(plan, identity, extra, training_cost(fitted)), certifier

    def _indices(self, plan: Plan, split: Split) -> list[int]:
        """The images to certify: those of the plan, or of its shard. Raises BenchError where a shard has none."""
        indices = examples(plan, split)
        return self.shard.part(indices) if self.shard else indices

    def estimate(self, plan: Plan) -> dict[str, Any]:
        """What a run would cost: its votes, and seconds by timing the untrained defense on this machine."""
        split, train = load_splits(plan.card, plan.split, "train")
        base = self._untrained_base(plan)
        defense = fitting.construct(plan, base, self.device)
        task, indices = make_task(plan, split, self.device), self._indices(plan, split)
        with steady(), torch.inference_mode(), fitting.blame(plan.defense, "in the estimate"):
            task = blocks.fitting_block(defense, task, indices[0])
            model = arithmetic.model(defense, plan.arithmetic, self.device)
            per_vote = check_rows(model, task, indices[0]) / task.block
            # Nobody counts a server's operations, so it is not asked again.
            flops = None if is_url(plan.base) else cost_per_vote(defense, task, indices[0]).flops
        votes = len(indices) * plan.procedure.most
        # A training step's backward pass costs about twice its forward pass.
        trainings = 0 if plan.weights else max(1, len(plan.candidates))
        epochs = trainings * getattr(defense.schedule(), "epochs", 0.0)
        queries = trainings * getattr(plan.config, "queries", 0)
        images = epochs * len(train.first(plan.card.presets[plan.preset].train_examples))
        return {
            "run": _name(plan),
            "seed": plan.seed,
            "images": len(indices),
            "votes": votes,
            "flops_per_vote": flops,
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
            "split": plan.split,
            "indices": indices,
            "images": shared.certified(plan).sha256(indices),
            "base": shared.base.identity(),
            "defense": {
                "name": registry.short_name(plan.defense),
                "source": plan.source,
                "config": asdict(plan.config),
                "weights": fitted.sha256,
                "parts": fitted.parts,
                "objective": plan.objective if uses_objective else None,
                **({"arithmetic": list(plan.arithmetic)} if plan.arithmetic else {}),
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

    def _certify(self, plan: Plan, fitted: fitting.Fitted, task: Task, indices: list[int], record: Run) -> None:
        logits = arithmetic.model(fitted.defense, plan.arithmetic, self.device)

        def model(x: Tensor, draw: Draw) -> Tensor:
            with fitting.blame(plan.defense, f"in certification, after {len(record.done)} images"):
                return logits(x, draw)

        finished = {c.index for c in record.done}
        left = [i for i in indices if i not in finished]
        environment.reset_peak_memory(self.device)
        tau = record.info["identity"]["noise"]["tau"]

        def start(label: int) -> Procedure:
            return plan.procedure.certify(plan.sigma, label, tau)

        with steady(), torch.inference_mode():
            reference = blocks.check_logits(model, task, indices[0])
            if strange := int(reference.isnan().any(1).sum()):
                self.reporter.say(f"{strange} of {task.block} rows of logits hold NaN: such votes count for no class")
            with fitting.blame(plan.defense, "in the check of its rows"):
                seconds = check_rows(model, task, indices[0])
            per_vote = cost_per_vote(fitted.defense, task, indices[0])  # operations are counted, not compiled
            base = self.materials(plan).base
            more = self.devices[1:] if isinstance(base, LocalBase) else []
            here = Certifier(plan.defense, fitted.defense, base, plan.arithmetic)
            others = [here.replica(task, device) for device in more]
            for copied, there in others:
                check_rows(copied, there, indices[0])
            votes = len(left) * plan.procedure.most
            self.reporter.say(
                f"{record.path.relative_to(self.out)}: {len(left)} images, {plan.procedure.kind} procedure, "
                f"at most {votes:,} votes, about {duration(votes * seconds / task.block / (1 + len(others)))} at most"
            )
            # Seconds of a resumed run are of several processes, which one calibration says nothing of.
            calibration = None if finished else environment.calibration_seconds(self.device)
            correct = sum(c.predicted == c.label for c in record.done)
            with self.reporter.certifying(registry.short_name(plan.defense), len(indices), len(finished)) as progress:
                progress(len(finished), correct)
                for certificate in certify(model, task, start, left, others):
                    record.append(certificate)
                    correct += certificate.predicted == certificate.label
                    progress(len(record.done), correct)
            self.materials(plan).base.check_unchanged(plan.defense)
            if not torch.equal(blocks.check_logits(model, task, indices[0]).nan_to_num(), reference.nan_to_num()):
                raise DefenseFault(f"{DRIFT} in {record.set_aside()}", plan.defense)
        cost = {
            **training_cost(fitted),
            "certify_seconds": sum(c.seconds for c in record.done),
            "calibration_seconds": calibration,
            "votes": (total := sum(c.votes for c in record.done)),
            "base_forwards": round(total * per_vote.base_forwards),
            "parameters": None if per_vote.flops is None else distinct([fitted.defense, *per_vote.classifiers]),
            "flops_per_vote": per_vote.flops,
            "peak_memory": environment.peak_memory(self.device),
        }
        record.finish(cost, metrics.summarise(record.done, plan.card.radii))


def training_cost(fitted: fitting.Fitted) -> dict[str, Any]:
    """What a record says of the training's cost."""
    return {
        "train_seconds": fitted.train_seconds,
        "queries": fitted.queries,
        "trainable_nominal": fitted.nominal,
        "trainable_updated": fitted.updated,
        "trained_here": fitted.here,
        "trained_elsewhere": fitted.elsewhere,
    }


def _name(plan: Plan) -> str:
    """What the run's folder is called, less its hash."""
    return f"{plan.card.name}-{registry.short_name(plan.defense)}-s{plan.sigma:g}"


def examples(plan: Plan, split: Split) -> list[int]:
    """The images that a plan certifies. A preset's number is meant for test: of a smaller validation split, all."""
    asked = plan.examples
    if plan.split == "validation" and plan.arguments["examples"] is None and asked.isdigit():
        asked = str(min(int(asked), len(split)))
    return choose(split, asked)


def make_task(plan: Plan, split: Split, device: torch.device) -> Task:
    """What the engine is given of a plan."""
    source = Noise(plan.seed, split.name)
    images: Callable[[list[int]], NDArray[Any]] = split.pixels
    noisy = noise.add_float(source, plan.sigma)
    if plan.noise == "grid":
        images, noisy = split.integers, gridnoise.GridNoise(source, plan.sigma, plan.card.levels).inputs
    return Task(
        images=images,
        labels=lambda i: int(split.labels[i]),
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
