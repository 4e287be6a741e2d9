"""From a defense's class to a trained, loaded, merged defense whose ``logits`` are fixed.

What training changed is stored once under the hash of everything that decided it; the defense that
certifies is always constructed and loaded, never the object that trained, so a run in one go and a
resumed one use the same path.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import noise, objectives, registry, training
from bench.base import BaseModel, source_sha256, state_sha256
from bench.cache import Entry, Trained
from bench.cards import Split
from bench.errors import BenchError, one_line
from bench.interface import Context, Defense
from bench.plan import Plan


@dataclass(frozen=True)
class Fitted:
    """A defense ready to certify, the hash of its trained weights, and what it is and took."""

    defense: Defense
    sha256: str | None  # None: nothing was trained
    train_seconds: float
    queries: int
    nominal: int
    updated: int
    total: int


@contextmanager
def blame(name: str) -> Iterator[None]:
    """Turn whatever a defense raises into one line that names it and the place."""
    try:
        yield
    except (BenchError, KeyboardInterrupt):
        raise
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        raise BenchError(f"defense {name}: {one_line(e)} ({frame.filename}:{frame.lineno})") from e


def construct(plan: Plan, base: BaseModel, device: torch.device) -> Defense:
    """The untrained defense, with torch's random state fixed by the seed."""
    access = plan.cls.needs(plan.config)
    if access > base.view(access).most:
        raise BenchError(f"defense {plan.defense} needs {access.name} access; base {base.name} does not offer it")
    context = Context(base.view(access), len(plan.card.classes), plan.card.shape, plan.train_sigma)
    with blame(plan.defense), training.fixed_rng(plan.seed):
        return plan.cls(context, plan.config).to(device).eval()


def fit(plan: Plan, base: BaseModel, train: Split, device: torch.device, progress: training.Progress) -> Fitted:
    """Train, or take from the cache, then construct, load and merge. Raises BenchError naming the defense."""
    defense = construct(plan, base, device)
    nominal = sum(p.numel() for p in defense.parameters() if p.requires_grad)
    trained = train_or_load(plan, base, train, device, progress, defense) if trains(plan, defense) else None
    if trained is not None:
        defense = construct(plan, base, device)
        load(defense, trained, plan.defense)
    total = sum(p.numel() for p in defense.parameters()) or base.parameters
    with blame(plan.defense):
        defense.merge()
    defense.eval().requires_grad_(False)
    if state_sha256(base.module, base.name) != base.sha256:
        raise BenchError(f"defense {plan.defense} changed the base classifier; train a copy: self.context.base.copy()")
    meta = trained.meta if trained else {}
    return Fitted(
        defense,
        trained.sha256 if trained else None,
        meta.get("train_seconds", 0.0),
        meta.get("queries", 0),
        nominal,
        meta.get("updated", 0),
        total,
    )


def trains(plan: Plan, defense: Defense) -> bool:
    """Whether the defense has anything to train."""
    return plan.cls.fit is not Defense.fit or any(p.requires_grad for p in defense.parameters())


def identity(plan: Plan, base: BaseModel, train: Split, device: torch.device) -> dict[str, Any]:
    """Everything that decides a defense's trained weights."""
    return {
        "defense": registry.short_name(plan.defense),
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
        "training": source_sha256(training.__file__),
        "objectives": source_sha256(objectives.__file__),
    }


def train_or_load(
    plan: Plan,
    base: BaseModel,
    train: Split,
    device: torch.device,
    progress: training.Progress,
    defense: Defense,
) -> Trained:
    """The stored training of a plan; where there is none, ``defense`` is trained in place and stored."""
    label = f"{plan.card.name}-{registry.short_name(plan.defense)}-s{plan.train_sigma:g}"
    entry = Entry(label, identity(plan, base, train, device))
    with entry.lock():
        found = entry.load()
        if found is not None:
            return found
        before = {k: v.detach().clone() for k, v in defense.state_dict().items()}
        spent: list[float] = []
        job = training.TrainingJob(
            data=train,
            augment=plan.card.augment,
            sigma=plan.train_sigma,
            objective=objectives.gaussian,
            seed=plan.seed,
            device=device,
            checkpoint=entry.checkpoint,
            progress=progress,
            spent=spent,
        )
        with blame(plan.defense), training.fixed_rng(plan.seed):
            defense.fit(job)
        after = defense.state_dict()
        owned = {k: v for k, v in after.items() if not _same_as_base(k, v, before, base)}
        changed = {k for k, v in after.items() if k in before and not torch.equal(v, before[k])}
        meta = {
            "train_seconds": sum(spent),
            "queries": getattr(defense.context.base, "queries", 0),
            "updated": sum(p.numel() for k, p in defense.named_parameters() if k in changed),
            "from_base": sorted(set(after) - set(owned)),
        }
        return entry.save(owned, meta)


def _same_as_base(key: str, value: Tensor, before: dict[str, Tensor], base: BaseModel) -> bool:
    """Whether a fresh construction restores this tensor: untouched by training, and equal to one of the base's."""
    if key not in before or not torch.equal(value, before[key]):
        return False
    return any(value.shape == b.shape and torch.equal(value, b) for b in base.module.state_dict().values())


def load(defense: Defense, trained: Trained, name: str) -> None:
    """Put stored weights into a freshly constructed defense. Raises BenchError where they do not fit."""
    try:
        missing, unexpected = defense.load_state_dict(trained.state, strict=False)
    except RuntimeError as e:
        raise BenchError(f"defense {name}: stored weights do not fit: {one_line(e)}") from None
    wrong = sorted(set(missing) - set(trained.meta["from_base"])) + list(unexpected)
    if wrong:
        raise BenchError(f"defense {name}: stored weights do not fit: {wrong[0]}")
