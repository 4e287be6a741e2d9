"""From a defense's class to a trained, loaded, merged defense whose ``logits`` are fixed.

What training changed is stored once under the hash of everything that decided it; the defense that
certifies is always constructed and loaded, never the object that trained, so a run in one go and a
resumed one use the same path.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
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
from bench.process import watchdog
from bench.runs.context import BuildContext, Workshop
from bench.runs.plan import Plan
from bench.smoothing import blocks, noise
from bench.smoothing.noise import TrainDraw
from bench.training import loop, objectives, spsa
from bench.training.weights import Entry, Trained

MERGE_TOLERANCE = 1e-3  # of the largest logit
_CHECKED = 8  # images on which logits are compared


@dataclass(frozen=True)
class Fitted:
    """A defense ready to certify, the hash of its trained weights, and what it is and took."""

    defense: Defense
    sha256: str | None  # None: nothing was trained
    train_seconds: float | None  # None: of weights that the user brought
    queries: int
    nominal: int  # parameters that require a gradient once built
    updated: int  # of these, in tensors that training changed
    here: int  # trained here: nominal, and the parameters of shared parts
    elsewhere: int  # part of F, neither the base's nor trained here
    parts: dict[str, str]  # sha256 of each shared part, file and inner defense
    sources: list[str]  # where files of weights trained elsewhere came from
    commits: dict[str, str]  # those of the hub's sources
    notes: list[str]  # what the defense states about itself
    uses_train_sigma: bool  # else no noise level of training decided anything


@contextmanager
def attribute_errors(name: str, doing: str, alone: bool = True) -> Iterator[None]:
    """Turn whatever a defense raises, or its silence, into one line that names it and the place: a DefenseFault.

    ``doing``: what it is asked for, as in "no answer for 9 s in training". What it changes of torch's settings is put
    back, but where it runs in several threads at once (not ``alone``).
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
        mend = "; free memory there, or make its batch smaller" if blocks.out_of_memory(e) else ""
        raise DefenseFault(f"{one_line(e)}{mend} ({frame.filename}:{frame.lineno})", name) from e


def construct(plan: Plan, base: BaseModel, device: torch.device, workshop: Workshop | None = None) -> Defense:
    """The untrained defense, with the random state fixed by the seed; its shared parts are trained."""
    context = BuildContext(plan, base, plan.cls.needs(plan.config), device, workshop)
    with attribute_errors(plan.defense, "while it is built"), globalstate.fixed_rng(plan.seed):
        return plan.cls(context, plan.config).to(device).eval()


def trains(defense: Defense) -> bool:
    """Whether a constructed defense has weights of its own; ``--weights`` are the base's where it has none."""
    return any(p.requires_grad for p in defense.parameters()) or type(defense).fit is not Defense.fit


def fit(plan: Plan, base: BaseModel, train: Split, device: torch.device, progress: loop.Progress) -> Fitted:
    """Train, or take from the cache or the user's file, then construct, load and merge.

    Raises BenchError naming the defense.
    """
    workshop = Workshop(train, progress)
    defense = construct(plan, base, device, workshop)
    nominal, here, elsewhere = _count(defense)
    brought = plan.weights is not None and trains(defense)
    if brought:  # trained by their author
        here, elsewhere = here - nominal, elsewhere + nominal
    used = context_of(defense)
    trained: Trained | None = None
    if trains(defense):
        if plan.weights is not None:
            trained = _given(plan.weights, plan, base, defense)
        else:
            trained = train_or_load(plan, base, train, device, progress, defense)
    if trained is not None:
        defense = construct(plan, base, device, workshop)
        with globalstate.fixed_rng(plan.seed, 1):
            load(defense, trained, plan.defense)
    merge(defense, train, plan, device)
    defense.requires_grad_(False)
    base.check_unchanged(plan.defense)
    meta = trained.meta if trained else {}
    return Fitted(
        defense,
        trained.sha256 if trained else None,
        None if brought else meta.get("train_seconds", 0.0) + used.part_seconds,
        meta.get("queries", 0),
        nominal,
        meta.get("updated", 0),
        here,
        elsewhere,
        used.used,
        [*used.sources, *([plan.weights.name] if plan.weights and brought else [])],
        used.commits,
        workshop.notes,
        trained is not None or used.asked_train_sigma,
    )


def merge(defense: Defense, data: Split, plan: Plan, device: torch.device) -> None:
    """Merge a trained defense, with the random state fixed by the seed; it ends in eval mode.

    Raises DefenseFault where its logits on a noisy block are not what they were.

    Folding weights in float32 changes the last bits of a logit: of timm's models by up to 1e-5 of the largest.
    """
    defense.eval()
    if type(defense).merge is Defense.merge:
        return
    rows = np.arange(min(_CHECKED, len(data)))
    clean = torch.from_numpy(data.pixels(rows)).to(device)
    noisy = clean + TrainDraw(noise.Noise(0, "check"), 0, len(rows), plan.sigma, device).normal(*clean.shape[1:])

    def logits() -> Tensor:
        # The randomness of a defense that draws some must be the same at both calls.
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
                f"merge() changes its logits: by up to {moved:.3g} on {len(rows)} noisy images, where the largest is "
                f"{largest:.3g} and {MERGE_TOLERANCE:g} of that is allowed; what is certified must be what was "
                f"trained: fold in all that logits() uses, or leave it unmerged"
            )


def context_of(defense: Defense) -> BuildContext:
    """The harness's side of a constructed defense's context."""
    return cast(BuildContext, defense.context)


def _count(defense: Defense) -> tuple[int, int, int]:
    """Parameters of a constructed defense: requiring a gradient, trained here, trained elsewhere."""
    parts = {id(p): p for module in context_of(defense).parts for p in module.parameters()}
    of_base = {id(p) for m in defense.modules() if isinstance(m, Classifier) for p in m.parameters()}
    nominal = {id(p): p for p in defense.parameters() if p.requires_grad}
    foreign = [p for p in defense.parameters() if id(p) not in parts | nominal and id(p) not in of_base]
    here = sum(p.numel() for p in (parts | nominal).values())
    return sum(p.numel() for p in nominal.values()), here, sum(p.numel() for p in foreign)


def identity(plan: Plan, base: BaseModel, train: Split, device: torch.device, parts: dict[str, str]) -> dict[str, Any]:
    """Everything that decides a defense's trained weights."""
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
        "parts": parts,
        "objective": plan.objective,
        "training": loop.SOURCE,
        "objectives": objectives.SOURCE,
        "spsa": spsa.SOURCE,
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
    """The stored training of a plan; where there is none, ``defense`` is trained in place and stored.

    ``most``: end each of its trainings after so many steps.
    """
    label = f"{plan.card.name}-{plugins.short_name(plan.defense)}-s{plan.train_sigma:g}"
    entry = Entry(label, identity(plan, base, train, device, context_of(defense).used))
    with entry.lock():
        found = entry.load()
        if found is not None:
            return found
        before = {k: v.detach().clone() for k, v in defense.state_dict().items()}
        spent: list[float] = []
        job = loop.TrainingJob(
            data=train,
            augment=plan.card.augment,
            sigma=plan.train_sigma,
            objective=objectives.OBJECTIVES[plan.objective],
            seed=plan.seed,
            device=device,
            checkpoint=entry.checkpoint,
            progress=progress,
            spent=spent,
            base=defense.context.base,
            most=most,
        )
        with attribute_errors(plan.defense, "in training"), globalstate.fixed_rng(plan.seed):
            defense.fit(job)
        after = defense.state_dict()
        owned = {k: v for k, v in after.items() if not _same_as_base(k, v, before, base)}
        changed = {k for k, v in after.items() if k in before and not torch.equal(v, before[k])}
        meta = {
            "train_seconds": sum(spent),
            "queries": defense.context.base.queries,
            "updated": sum(p.numel() for k, p in defense.named_parameters() if k in changed),
            "from_base": sorted(set(after) - set(owned)),
        }
        return entry.save(owned, meta)


def _same_as_base(key: str, value: Tensor, before: dict[str, Tensor], base: BaseModel) -> bool:
    """Whether a fresh construction restores this tensor: untouched by training, and equal to one of the base's.

    Or to rows of one: a defense may split a fused layer.
    """
    if key not in before or not torch.equal(value, before[key]):
        return False
    for b in base.module.state_dict().values():
        parts = b.split(len(value)) if value.ndim == b.ndim > 0 and value.numel() else (b,)
        if any(value.shape == part.shape and torch.equal(value, part) for part in parts):
            return True
    return False


def _given(path: Path, plan: Plan, base: BaseModel, defense: Defense) -> Trained:
    """A user's own trained weights: the whole state of the defense, or that less what it takes from the base."""
    stored = tensors.read(path)
    fresh = defense.state_dict()
    from_base = {k for k, v in fresh.items() if _same_as_base(k, v, fresh, base)}
    tensors.check(f"--weights {path} does not fit defense {plan.defense}", fresh, stored.tensors, from_base)
    moved = {k for k, v in stored.tensors.items() if not torch.equal(v.to(fresh[k]), fresh[k])}
    updated = sum(p.numel() for k, p in defense.named_parameters() if k in moved)
    return Trained(stored.tensors, {"from_base": sorted(from_base), "updated": updated}, stored.sha256)


def load(defense: Defense, trained: Trained, name: str) -> None:
    """Put stored weights into a freshly constructed defense. Raises BenchError where they do not fit."""
    wanted = defense.state_dict()
    tensors.check(f"defense {name}: stored weights do not fit", wanted, trained.state, trained.meta["from_base"])
    defense.load_state_dict(trained.state, strict=False)
