"""Run the plans of one command: data, base, defense, engine, record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import globalstate, plugins
from bench.errors import DefenseFault, say_loading
from bench.io.files import digest
from bench.models import arithmetic
from bench.models.arithmetic import deterministic
from bench.models.base import LocalBase
from bench.models.load import architecture_base, load_base, untrained_base
from bench.models.names import Given
from bench.models.summary import report_base
from bench.process import environment
from bench.process.runlog import STARTED, LoggingReporter, Reporter, log, recording, signature
from bench.records.record import Record, read_run
from bench.records.schema import Identity
from bench.records.shards import Shard
from bench.records.writer import run_folder
from bench.runs import fitting, fresh_noise, search
from bench.runs.certifier import DeviceCertifier, NotOneFunction, check_independent
from bench.runs.identity import examples, identity, make_task, run_name
from bench.runs.plan import Plan
from bench.runs.prepared import Materials, PreparedRun
from bench.runs.splits import Splits
from bench.runs.writer import RunWriter
from bench.smoothing import blocks
from bench.smoothing.engine import certify
from bench.smoothing.task import ImageCache


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
        """``devices``: all that share the certification, ``device`` first; ``device`` alone does the rest."""
        self.devices = list(devices) or [device]
        self.threads = environment.threads(device)
        environment.keep_freed_memory()
        self.device, self.out, self.reporter, self.shard = device, out, LoggingReporter(reporter, log.info), shard
        self._materials: dict[tuple[str, str, str, Given, bool, bool], Materials] = {}
        self._splits = Splits()

    def materials(self, plan: Plan) -> Materials:
        """Load the splits and the base of a plan; a base whose weights are used is trained if the cache has none."""
        given = Given(self._base_weights(plan), plan.normalisation)
        probe = not plan.cls.adapts
        key = (plan.card.name, plan.preset, plan.base, given, probe, plan.from_scratch)
        if key not in self._materials:
            say_loading(f"{plan.card.name} and base {plan.base}")
            train, validation = self._splits.trained_on(plan), self._splits.usual(plan.card)["validation"]
            if plan.from_scratch:  # without --base, so without --mean and --std
                base = architecture_base(plan.card, plan.base, self.device)
            else:
                with self.reporter.training(f"base {plan.base}") as progress:
                    base = load_base(plan.card, plan.base, train, validation, self.device, progress, given, probe)
            means = plan.card.presets[plan.preset]
            better = means.better_base if plan.base == means.base else ""
            report_base(base, validation, self.reporter.say, log.warning, better)
            self._materials[key] = Materials(train, validation, self._splits, base)
        return self._materials[key]

    def _base_weights(self, plan: Plan) -> Path | None:
        """Return the plan's ``--weights`` if they are the base's: if its defense has no weights of its own."""
        if plan.weights is None:
            return None
        given = Given(normalisation=plan.normalisation)
        base = untrained_base(plan.card, plan.base, self.device, not plan.cls.adapts, given)
        return None if fitting.trains(fitting.construct(plan, base, self.device)) else plan.weights

    def prepare(self, plan: Plan) -> PreparedRun:
        """Search and train a plan's defense, or take it from the cache, and choose the size of its blocks."""
        materials = self.materials(plan)
        split, name = materials.certified(plan), run_name(plan)
        indices = examples(plan, split)
        if self.shard:
            self.shard.part(indices)  # raises for a shard without images, before anything is trained for it
        plan, tried = self._searched(plan, materials)
        trained_on = materials.trained_on(plan)
        if trained_on is not materials.train:
            added = trained_on.found.removeprefix(f"{materials.train.found}; ")
            self.reporter.say(f"{plugins.short_name(plan.defense)}: {added}")
        with self.reporter.training(f"{plugins.short_name(plan.defense)} at sigma {plan.train_sigma:g}") as progress:
            fitted = fitting.fit(plan, materials.base, trained_on, self.device, progress)
        if fitted.sha256 and fitted.train_seconds is not None:
            log.info("weights %s, which took %.1f s of training", fitted.sha256[:8], fitted.train_seconds)
        task = make_task(plan, split, self.device)
        largest = identity(plan, materials.base, split, fitted, indices, task)

        def with_rows(rows: int) -> Identity:
            return largest.replace(block=[rows, *task.shape])

        # A run that has begun keeps the size of its blocks, whatever fits into memory now.
        shard = self.shard.folder if self.shard else ""
        folders = ((rows, run_folder(self.out, name, with_rows(rows))) for rows in blocks.block_sizes(task.block))
        rows = next((rows for rows, folder in folders if (folder / shard / "run.json").exists()), None)
        if rows is None:
            with (
                deterministic(),
                torch.inference_mode(),
                fitting.attribute_errors(plan.defense, "at its first block"),
            ):
                rows = blocks.fitting_block(fitted.defense, task, indices[0]).block
            if rows < task.block:
                self.reporter.say(f"{name}: blocks of {rows} rows; {task.block} do not fit into memory")
        return PreparedRun(plan, name, tried, materials, fitted, with_rows(rows), replace(task, block=rows))

    def _searched(self, plan: Plan, materials: Materials) -> tuple[Plan, list[dict[str, Any]]]:
        """Return the plan with its searched settings chosen, and the candidates' scores; unchanged without a search."""
        if not plan.candidates:
            return plan, []
        name = f"{len(plan.candidates)} candidates of {plugins.short_name(plan.defense)}"
        validation = materials.validation
        task = make_task(plan, validation, self.device)
        with self.reporter.training(name) as progress:
            return search.best(plan, materials.base, materials.train, task, len(validation), progress)

    def begin(self, plan: Plan) -> PreparedRun:
        """Log the start of a run and prepare it. Raises BenchError where the device lacks its arithmetic."""
        arithmetic.check(plan.arithmetic, self.device)
        words = ["--device", self.device.type, "--out", str(self.out)]
        words += ["--shard", str(self.shard)] if self.shard else []
        versions = ", ".join(f"{k} {v}" for k, v in environment.describe(self.device).items())
        log.info("on %s, %s", versions, signature())
        log.info("%s%s", STARTED, plan.options.command(*words))
        log.info("loading %s and base %s", plan.card.name, plan.base)
        prepared = self.prepare(plan)
        prepared.warn_of_unused_options()
        return prepared

    def log_file(self, plan: Plan) -> Path:
        """Return the place of a run's log until the run has a folder."""
        shard = f".{self.shard.folder}" if self.shard else ""
        return self.out / f"{run_name(plan)}-{digest(plan.options.record())[:8]}{shard}.log"

    def runs(self, plans: Sequence[Plan]) -> Iterator[Record | DefenseFault]:
        """Do all runs; yields the record of each, or the fault of its defense, after which the others go on."""
        for plan in plans:
            try:
                yield self.run(plan)
            except DefenseFault as e:
                yield e

    def run(self, plan: Plan) -> Record:
        """Do a run, or its shard, or resume it. Every image is on disk as soon as it is certified."""
        with (
            recording(self.log_file(plan), self.reporter.terminal) as own_log,
            globalstate.restored_torch_settings(plan.defense, "when it certified"),
        ):
            prepared = self.begin(plan)
            whole = run_folder(self.out, prepared.name, prepared.identity)
            if self.shard and (whole / "run.json").exists() and (merged := read_run(whole)).complete:
                own_log.discard()
                self.reporter.terminal.say(f"{whole}: already complete, nothing to do")
                return merged
            begun = (whole / (self.shard.folder if self.shard else "") / "run.json").exists()
            writer = RunWriter(self.out, prepared.header(begun), own_log, self.reporter.terminal, self.shard)
            try:
                if not writer.complete:
                    self._certify(prepared, writer)
            finally:
                writer.close()
            return read_run(writer.record.path, self.shard)

    def _certify(self, prepared: PreparedRun, writer: RunWriter) -> None:
        certifier, task = prepared.certifier, prepared.task
        first = DeviceCertifier(certifier, task, writer.first)
        others = self.devices[1:] if isinstance(certifier.base, LocalBase) else []
        places = [first, *(first.replicate(device) for device in others)]
        for place in places:
            place.use_threads(self.threads)
        if others:
            check_independent(places)
        writer.check_same_function(first.fingerprint, "this process")
        devices, sample = [place.device for place in places], fresh_noise.BatchSample(task.block)
        try:
            with deterministic(), torch.inference_mode():
                again = list(certify(devices, writer.start, writer.to_redraw()))
                writer.check_redrawn(again, writer.drawn_on(writer.header.info.environment.as_json()))
            measured = first.measure(calibrate=not writer.resumed)
            writer.announce(measured, len(places))
            with writer.progress() as update, deterministic(), torch.inference_mode():
                update(*writer.so_far)
                for certificate in certify(devices, writer.start, writer.left, sample.see):
                    writer.add(certificate)
                    update(*writer.so_far)
            if sample.kept is not None:
                first.check_again(*sample.kept)
            if others:
                check_independent(places)
            peak = max(place.finish() for place in places)
            if (audit := writer.audit(task.block)) is not None:
                fresh = prepared.fresh_task(audit.noise)
                hits = fresh_noise.draw(replace(first.device, task=fresh), audit, ImageCache(fresh).get(audit.claims))
                writer.check_audit(audit, hits)
        except NotOneFunction as e:
            raise writer.refuse(e) from None
        writer.finish(measured, peak)
