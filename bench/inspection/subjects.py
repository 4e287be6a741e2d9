"""The trained functions of finished runs, rebuilt for inspection, and the denoiser they are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import plugins
from bench.errors import BenchError
from bench.inspection import cam
from bench.inspection.copies import Copies
from bench.inspection.score import Denoiser
from bench.interface import Access, Draw
from bench.models.base import Classifier, LocalBase
from bench.models.served import is_url
from bench.process.runlog import LoggingReporter, Reporter, log
from bench.records.record import Record
from bench.runs.context import BuildContext, PartTraining
from bench.runs.prepared import PreparedRun
from bench.runs.rebuilding import UntrainedReporter, finished, from_cache, through_base
from bench.runs.session import Session
from bench.training.denoising import Consistency

DIFFUSION = "diffusion"  # the defense whose denoiser gives the score


@dataclass(frozen=True)
class Subject:
    """One run: its record, and its function with gradients."""

    label: str  # unique among the runs
    record: Record
    run: PreparedRun

    def logits(self, x: Tensor, draw: Draw) -> Tensor:
        """Compute logits in float32, whatever arithmetic the run certified in."""
        with through_base(self.run.fitted.defense):
            out: Tensor = self.run.fitted.defense(x, draw)
        return out.float()

    def seen(self, x: Tensor, draw: Draw) -> tuple[nn.Module, Tensor]:
        """Return the classifier that classifies the pixels, and what it is given. Raises ``cam.NoMap``."""
        inside = [m for m in self.run.fitted.defense.modules() if isinstance(m, Classifier)]
        with torch.no_grad():
            return cam.seen_by([self.run.materials.base.module, *inside], lambda: self.logits(x, draw))

    def target(self, copies: Copies) -> tuple[cam.Target, bool]:
        """Return Grad-CAM's layer, and whether the classifier is given other pixels than the noisy image.

        Raises ``cam.NoMap`` where the run has no map.
        """
        x = copies.noisy
        network, given = self.seen(x, copies.draw())
        if not isinstance(network, Classifier):
            raise cam.NoMap(f"its classifier is no model of timm ({type(network).__name__})")
        with torch.no_grad():
            return cam.target_of(network.model, lambda: network(given)), not torch.equal(given, x)


def read(paths: Sequence[Path]) -> list[Record]:
    """Read the records of finished runs that can be inspected together. Raises BenchError naming the first cannot."""
    records = [_readable(path) for path in paths]
    first = records[0]
    for other in records[1:]:
        if other.path.resolve() in [r.path.resolve() for r in records[: records.index(other)]]:
            raise BenchError(f"{other.path} is named twice; name each run once")
        for what in ("dataset", "card", "split", "sigma"):
            mine, its = (getattr(r.identity, what) for r in (first, other))
            if mine != its:
                raise BenchError(
                    f"{other.path}: its {what} is {its}, that of {first.path} is {mine}; inspect runs of one data set, "
                    f"split and sigma together, the others by themselves"
                )
    return records


def _readable(path: Path) -> Record:
    record = finished(path, "inspect")
    if is_url(str(record.info.arguments.get("base"))):
        raise BenchError(
            f"{path}: its base is a server that only answers queries, so there are no gradients to inspect"
        )
    return record


def images(records: Sequence[Record], count: int) -> list[int]:
    """Choose images that all runs certified, evenly from the first to the last. Raises BenchError."""
    shared = sorted(set.intersection(*(set(r.identity.indices) for r in records)))
    if not shared:
        raise BenchError("these runs have no image in common; inspect them by themselves")
    if not 1 <= count <= len(shared):
        raise BenchError(f"--images {count}: must be 1 to {len(shared)}, the images that all these runs certified")
    return [shared[i * (len(shared) - 1) // max(1, count - 1)] for i in range(count)]


def rebuild_all(
    records: Sequence[Record], device: torch.device, terminal: Reporter, defense: str | None = None
) -> list[Subject]:
    """Rebuild the runs from their records and the cache; nothing is trained.

    Args:
        records: As ``read`` returns them.
        device: Where they compute.
        terminal: Shows remarks.
        defense: The file of the records' defense, which is run only where the user names it.

    Raises:
        BenchError: Weights are not in the cache, or what is rebuilt is not the function that was certified.
    """
    sessions: dict[Path, Session] = {}
    subjects = []
    for label, record in zip(labels(records), records, strict=True):
        reporter = UntrainedReporter(terminal, record)
        session = sessions.setdefault(record.path.parent, Session(device, record.path.parent, reporter))
        session.reporter = LoggingReporter(reporter, log.info)  # the message for missing weights names the record
        run = _rebuilt(record, session, defense)
        subjects.append(Subject(label, record, run))
    return subjects


def labels(records: Sequence[Record]) -> list[str]:
    """Name each run by its defense, with the end of its folder's name where several have one."""
    names = [plugins.short_name(r.identity.defense.name) for r in records]
    several = Counter(names)
    return [
        name if several[name] == 1 else f"{name} {r.identity.folder_suffix.removeprefix('-')}"
        for name, r in zip(names, records, strict=True)
    ]


def _rebuilt(record: Record, session: Session, defense: str | None) -> PreparedRun:
    own = defense if str(record.info.arguments.get("defenses")).endswith(".py") else None
    run = from_cache(record, session, own)
    if not isinstance(run.materials.base, LocalBase):
        raise BenchError(f"{record.path}: its base only answers queries, so there are no gradients to inspect")
    return run


def denoiser(subjects: Sequence[Subject], device: torch.device, terminal: Reporter) -> Denoiser:
    """Return the denoiser of a diffusion run among the given, else that of ``--defense diffusion``.

    That one is a small UNet, trained on the card's training images if the cache does not have it. Of a run only one
    that denoises in one step counts, whose result is the mean of the clean images, and no consistency model, whose
    result is one of them instead.
    """
    sigma = subjects[0].run.plan.sigma
    for subject in subjects:
        plan, defense = subject.run.plan, cast(Any, subject.run.fitted.defense)
        one_step = plugins.short_name(plan.defense) == DIFFUSION and plan.config.steps == 1
        if one_step and not isinstance(defense.denoising, Consistency):
            return Denoiser(defense.denoised, sigma, f"that of the run {subject.record.path.name}")
    run = subjects[0].run
    with terminal.training("the denoiser that gives the score") as progress:
        training = PartTraining(run.materials.train, progress)
        context = BuildContext(run.plan, run.materials.base, Access.QUERY, device, training)
        made: Any = context.inner(DIFFUSION, unet="").to(device).eval()
    width, epochs = made.config.width, made.config.epochs
    return Denoiser(
        made.denoised,
        sigma,
        f"a UNet of width {width} trained here for {epochs:g} epochs on {len(run.materials.train):,} training images, "
        f"as by bench run --defense diffusion --preset {run.plan.preset} --seed {run.plan.seed}",
    )
