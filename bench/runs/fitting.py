"""Construct, train, load and merge a defense; from then on its ``logits`` are fixed.

The tensors that training changed are cached under the hash of everything that decided them. The defense that
certifies is always a new object with loaded weights, never the one that trained, so resumed and uninterrupted runs
take the same path.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench import globalstate, plugins
from bench.data.split import Split
from bench.errors import BenchError, DefenseFault, one_line
from bench.interface import Defense
from bench.io import tensors
from bench.models.arithmetic import deterministic
from bench.models.base import BaseModel, Classifier
from bench.models.peft_folders import FolderWeights
from bench.process import watchdog
from bench.runs import confidence
from bench.runs.context import BuildContext, PartTraining
from bench.runs.plan import Plan
from bench.smoothing import blocks, noise
from bench.smoothing.noise import TrainDraw
from bench.training import bfloat16, loop, objectives, versions
from bench.training.objectives.catrs import CATRS
from bench.training.weights import Trained, Weights, cached_training

MERGE_TOLERANCE = 1e-3  # of the largest logit
_CHECKED = 8  # images on which logits are compared


@dataclass(frozen=True)
class Fitted:
    """A defense ready to certify, the hash of its trained weights, and the cost of training."""

    defense: Defense
    sha256: str | None  # None: nothing was trained
    train_seconds: float | None  # None: the user gave the weights
    queries: int | None  # None: the user gave the weights
    nominal: int  # parameters that require a gradient once built
    updated: int  # those of them in tensors that training changed
    here: int  # parameters trained here: nominal, and those of shared parts
    elsewhere: int  # parameters of F that are neither the base's nor trained here
    parts: dict[str, str]  # sha256 of each shared part, file and inner defense
    sources: list[str]  # hub ids, folders and files with weights trained elsewhere
    commits: dict[str, str]  # hub id -> the commit of its files
    notes: list[str]  # the defense's notes on itself
    uses_train_sigma: bool  # False: the training noise level decided nothing here
    given: bool  # the user gave its weights, so how they were trained is unknown
    training_arithmetic: list[str]  # of everything trained here, other than float32


@contextmanager
def attribute_errors(name: str, doing: str, alone: bool = True) -> Iterator[None]:
    """Turn an exception or a timeout of a defense into a DefenseFault: one line with its name and the place.

    Changes to torch's settings are reverted, except where the defense runs in several threads (``alone`` is False).

    Args:
        name: The defense.
        doing: Completes "no answer for 9 s ...", such as "in training".
        alone: Whether the defense runs in this thread only.
    """
    try:
        with (
            watchdog.watched(name, doing),
            globalstate.restored_torch_settings(name, doing) if alone else nullcontext(),
        ):
            yield
    except DefenseFault as e:
        raise e if e.defense else DefenseFault(str(e), name) from None
    except BenchError:
        raise
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        fix = "; free memory there, or set a smaller batch" if blocks.out_of_memory(e) else ""
        raise DefenseFault(f"{one_line(e)}{fix} ({frame.filename}:{frame.lineno})", name) from e


def construct(plan: Plan, base: BaseModel, device: torch.device, training: PartTraining | None = None) -> Defense:
    """Build the untrained defense, with the random state fixed by the seed; train its parts with ``training``."""
    context = BuildContext(plan, base, plan.cls.needs(plan.config), device, training)
    with attribute_errors(plan.defense, "while it is built"), globalstate.fixed_rng(plan.seed):
        return plan.cls(context, plan.config).to(device).eval()


def trains(defense: Defense) -> bool:
    """Return whether a constructed defense has weights of its own; if not, ``--weights`` are the base's."""
    return any(p.requires_grad for p in defense.parameters()) or type(defense).fit is not Defense.fit


def fit(
    plan: Plan,
    base: BaseModel,
    train: Split,
    device: torch.device,
    progress: loop.Progress,
    notes: list[str] | None = None,
) -> Fitted:
    """Train a defense or load its weights from the cache or the user's file; then construct, load and merge it.

    ``notes``: those already printed. Raises BenchError naming the defense.
    """
    training = PartTraining(train, progress, notes=[] if notes is None else notes)
    defense = construct(plan, base, device, training)
    nominal, here, elsewhere = count_parameters(defense)
    given = plan.weights is not None and trains(defense)
    if given:  # trained by their author
        here, elsewhere = here - nominal, elsewhere + nominal
    used = context_of(defense)
    trained: Trained | None = None
    if trains(defense):
        trained = weights_of(plan, base, train, device, progress, defense)
    if trained is not None:
        defense = construct(plan, base, device, training)
        with globalstate.fixed_rng(plan.seed, 1):
            load(defense, trained, plan.defense)
    merge(defense, train, plan, device)
    defense.requires_grad_(False)
    base.check_unchanged(plan.defense)
    meta = trained.meta if trained else {}
    return Fitted(
        defense=defense,
        sha256=trained.sha256 if trained else None,
        train_seconds=None if given else meta.get("train_seconds", 0.0) + used.part_seconds,
        queries=None if given else meta.get("queries", 0),
        nominal=nominal,
        updated=meta.get("updated", 0),
        here=here,
        elsewhere=elsewhere,
        parts=used.used,
        sources=used.sources,
        commits=used.commits,
        notes=training.notes,
        uses_train_sigma=(trained is not None and not given) or used.asked_train_sigma,
        given=given,
        training_arithmetic=sorted({*meta.get("arithmetic", []), *used.part_arithmetic}),
    )


def weights_of(
    plan: Plan, base: BaseModel, train: Split, device: torch.device, progress: loop.Progress, defense: Defense
) -> Trained:
    """Return the weights of a constructed defense: the user's, or those of the cache, where they are stored first."""
    if plan.weights is not None:
        return _read_given(plan.weights, plan, base, defense)
    return train_or_load(plan, base, train, device, progress, defense)


def merge(defense: Defense, data: Split, plan: Plan, device: torch.device) -> None:
    """Merge a trained defense, with the random state fixed by the seed; leave it in eval mode.

    Raises DefenseFault where merging changes its logits on a noisy block. Folding weights in float32 changes the last
    bits: in timm's models by up to 1e-5 of the largest logit.
    """
    defense.eval()
    if type(defense).merge is Defense.merge:
        return
    rows = np.arange(min(_CHECKED, len(data)))
    clean = torch.from_numpy(data.pixels(rows)).to(device)
    noisy = clean + TrainDraw(noise.Noise(0, "check"), 0, len(rows), plan.sigma, device).normal(*clean.shape[1:])

    def logits() -> Tensor:
        # A randomised defense needs the same draws at both calls.
        draw = TrainDraw(noise.Noise(1, "check"), 0, len(rows), plan.sigma, device)
        with torch.no_grad(), globalstate.fixed_rng(0), deterministic():
            return cast(Tensor, defense(noisy, draw)).double()

    with attribute_errors(plan.defense, "in merge"):
        before = logits()
        with globalstate.fixed_rng(plan.seed, 2):
            defense.merge()
        defense.eval()
        moved, largest = float((logits() - before).abs().max()), float(before.abs().max())
        if not moved <= MERGE_TOLERANCE * largest and before.isfinite().all():
            raise DefenseFault(
                f"merge() changes its logits by up to {moved:.3g} on {len(rows)} noisy images; allowed is "
                f"{MERGE_TOLERANCE:g} of the largest logit, {largest:.3g}; the certified function must be the trained "
                f"one: fold in everything that logits() uses, or do not merge it"
            )


def context_of(defense: Defense) -> BuildContext:
    """Return a constructed defense's context as the harness sees it."""
    return cast(BuildContext, defense.context)


def count_parameters(defense: Defense) -> tuple[int, int, int]:
    """Count a constructed defense's parameters: requiring a gradient, trained here, trained elsewhere."""
    parts = {id(p): p for module in context_of(defense).parts for p in module.parameters()}
    of_base = {id(p) for m in defense.modules() if isinstance(m, Classifier) for p in m.parameters()}
    nominal = {id(p): p for p in defense.parameters() if p.requires_grad}
    foreign = [p for p in defense.parameters() if id(p) not in parts | nominal and id(p) not in of_base]
    here = sum(p.numel() for p in (parts | nominal).values())
    return sum(p.numel() for p in nominal.values()), here, sum(p.numel() for p in foreign)


def weights_identity(
    plan: Plan, base: BaseModel, train: Split, device: torch.device, context: BuildContext
) -> dict[str, Any]:
    """Return everything that decides a defense's trained weights, as JSON; ``context`` is that of its construction."""
    by_objective = [plan.objective] if plan.uses_objective else []
    code = versions.of(*by_objective) | versions.used_by(plan.cls, plan.objective) | context.versions
    code |= versions.of_arithmetic(plan.training_arithmetic)
    constants = plan.training_objective.constants() if by_objective else {}
    return {
        "defense": plugins.short_name(plan.defense),
        "source": plan.source,
        "config": asdict(plan.config),
        "base": base.sha256,
        "classes": len(plan.card.classes),
        "train": train.sha256(),
        "augment": plan.card.augment,
        "train_sigma": plan.train_sigma,
        "seed": plan.seed,
        "noise": noise.VERSION,
        "device": device.type,
        "parts": context.used,
        "objective": plan.objective,
        **({"objective_constants": constants} if constants else {}),
        "versions": code,
    }


def train_or_load(
    plan: Plan,
    base: BaseModel,
    train: Split,
    device: torch.device,
    progress: loop.Progress,
    defense: Defense,
    most: int | None = None,
) -> Trained:
    """Load a plan's weights from the cache; if there are none, train ``defense`` in place and store them.

    ``most`` is the maximum number of steps of each of its trainings.
    """
    context, objective = context_of(defense), plan.training_objective
    if objective.remark and plan.uses_objective:
        context.note(objective.remark)
    if isinstance(objective, CATRS) and plan.uses_objective:
        objective = _with_votes(plan, objective, base, train, device, progress, context)

    def fit_defense(checkpoint: Path) -> Weights:
        before = {k: v.detach().clone() for k, v in defense.state_dict().items()}
        job = loop.TrainingJob(
            data=train,
            augment=plan.card.augment,
            sigma=plan.train_sigma,
            objective=bfloat16.logits_alone(objective),
            seed=plan.seed,
            device=device,
            checkpoint=checkpoint,
            progress=progress,
            base=defense.context.base,
            most=most,
            arithmetic=plan.training_arithmetic,
        )
        with attribute_errors(plan.defense, "in training"), globalstate.fixed_rng(plan.seed):
            defense.fit(job)
        after = defense.state_dict()
        owned = {k: v for k, v in after.items() if not _same_as_base(k, v, before, base)}
        changed = {k for k, v in after.items() if k in before and not torch.equal(v, before[k])}
        meta = {
            "train_seconds": job.seconds,
            "queries": defense.context.base.queries,
            "updated": sum(p.numel() for k, p in defense.named_parameters() if k in changed),
            "from_base": sorted(set(after) - set(owned)),
            "arithmetic": sorted(job.used),
        }
        return owned, meta

    label = f"{plan.card.name}-{plugins.short_name(plan.defense)}-s{plan.train_sigma:g}"
    return cached_training(label, weights_identity(plan, base, train, device, context), fit_defense)


def _with_votes(
    plan: Plan,
    objective: CATRS,
    base: BaseModel,
    train: Split,
    device: torch.device,
    progress: loop.Progress,
    context: BuildContext,
) -> CATRS:
    """Return CAT-RS with the smoothed predictions of the same defense, trained under gaussian noise of sigma .25."""
    sigma = objectives.REFERENCE_SIGMA
    reference = replace(plan, objective="gaussian", sigma=sigma, train_sigma=sigma)
    gaussian = fit(reference, base, train, device, progress, context.notes)
    counted = confidence.probabilities(
        gaussian.defense,
        {"weights": gaussian.sha256, "defense": plan.source, "base": base.sha256, "seed": plan.seed},
        train,
        context.classes,
        objective.votes,
        device,
        progress,
    )
    context.used["smoothed predictions"] = counted.sha256  # they decide the weights
    context.part_seconds += (gaussian.train_seconds or 0.0) + counted.meta["train_seconds"]
    return replace(objective, probabilities=counted.state["probabilities"].to(device))


def _same_as_base(key: str, value: Tensor, before: dict[str, Tensor], base: BaseModel) -> bool:
    """Return whether construction restores this tensor: training left it equal to a tensor of the base.

    Rows of one count too, since a defense may split a fused layer.
    """
    if key not in before or not torch.equal(value, before[key]):
        return False
    for b in base.module.state_dict().values():
        parts = b.split(len(value)) if value.ndim == b.ndim > 0 and value.numel() else (b,)
        if any(value.shape == part.shape and torch.equal(value, part) for part in parts):
            return True
    return False


def _read_given(path: Path, plan: Plan, base: BaseModel, defense: Defense) -> Trained:
    """Read a user's own weights: the defense's complete state, or that without the tensors taken from the base."""
    if path.is_dir():
        assert isinstance(defense, FolderWeights), "make_plans has checked it"
        state, sha256 = defense.read_folder(path)
        stored = tensors.Stored(state, {}, sha256)
    else:
        stored = tensors.read(path)
    fresh = defense.state_dict()
    from_base = {k for k, v in fresh.items() if _same_as_base(k, v, fresh, base)}
    tensors.check(f"--weights {path} does not fit defense {plan.defense}", fresh, stored.tensors, from_base)
    moved = {k for k, v in stored.tensors.items() if not torch.equal(v.to(fresh[k]), fresh[k])}
    updated = sum(p.numel() for k, p in defense.named_parameters() if k in moved)
    return Trained(stored.tensors, {"from_base": sorted(from_base), "updated": updated}, stored.sha256)


def load(defense: Defense, trained: Trained, name: str) -> None:
    """Load stored weights into a constructed defense. Raises BenchError where they do not fit."""
    wanted = defense.state_dict()
    tensors.check(f"defense {name}: stored weights do not fit", wanted, trained.state, trained.meta["from_base"])
    defense.load_state_dict(trained.state, strict=False)
