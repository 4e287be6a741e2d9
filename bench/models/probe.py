"""The head that a base of other classes gets: a linear layer on frozen features of the clean training images."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench import globalstate
from bench.data.split import Split
from bench.errors import BenchError
from bench.interface import Schedule
from bench.io import tensors
from bench.models.base import Classifier, state_sha256
from bench.models.blueprints import Blueprint
from bench.training import loop, objectives
from bench.training.weights import Entry

# Features are standardised first: without that, a base whose features vary little ends far below what
# logistic regression finds.
PROBE = Schedule(epochs=20, batch=64, lr=1e-2, weight_decay=0.0, warmup=0.1)
_BLOCK = 64  # images a forward pass while features are computed


def linear_probe(
    plan: Blueprint,
    module: Classifier,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: loop.Progress,
) -> dict[str, Any]:
    """Give ``module``, in place, a head for the card's classes, trained on clean images with all else frozen.

    Trained once and cached. Returns what to record: schedule, seconds, validation accuracy (0 to 1), the
    classes there were. Raises BenchError where the head is no linear layer on one vector an image.
    """
    card, classes = plan.card, len(plan.card.classes)
    start = state_sha256(module)
    head = new_head(module, classes, device)
    prefix = next(name for name, m in module.named_modules() if m is head)
    identity = plan.describe() | {
        "start": start,
        "probe": asdict(PROBE),
        "train": train.sha256(),
        "classes": classes,
        "device": device.type,
        "training": loop.SOURCE,
    }
    entry = Entry(f"{card.name}-probe", identity)
    with entry.lock():
        trained = entry.load()
        if trained is None:
            started = time.perf_counter()
            rows = features(module, head, train, device, progress)
            spent = [time.perf_counter() - started]
            center, scale = rows.standardise()
            module.requires_grad_(False)
            head.requires_grad_(True)
            job = loop.TrainingJob(
                data=rows,
                augment=(),
                sigma=0.0,
                objective=objectives.clean,
                seed=0,
                device=device,
                checkpoint=entry.checkpoint,
                progress=progress,
                spent=spent,
            )
            job.train(head, lambda x, y, draw: job.objective(lambda z, _: head(z), x, y, draw), PROBE)
            with torch.no_grad():  # so that the head takes the features as the base makes them
                head.weight.div_(torch.from_numpy(scale).to(device))
                head.bias.sub_(head.weight @ torch.from_numpy(center).to(device))
            accuracy = plan.accuracy(module, validation, device)
            meta = {"probe_seconds": sum(spent), "probe_validation_clean_accuracy": accuracy}
            trained = entry.save({f"{prefix}.{k}": v for k, v in head.state_dict().items()}, meta)
    tensors.check(
        f"the probe of base {plan.name}", {f"{prefix}.{k}": v for k, v in head.state_dict().items()}, trained.state
    )
    module.load_state_dict(trained.state, strict=False)
    keep = {k: trained.meta[k] for k in ("probe_seconds", "probe_validation_clean_accuracy")}
    return keep | {"probe": asdict(PROBE), "probed_from_classes": plan.classes}


def new_head(module: Classifier, classes: int, device: torch.device) -> nn.Linear:
    """Replace the head by a fresh linear layer for ``classes``, always the same one, and return it.

    ``module`` ends on ``device``. Raises BenchError where its kind of head is not one linear layer.
    """
    with globalstate.fixed_rng(0):
        module.model.reset_classifier(classes)  # type: ignore[operator]
    module.to(device)
    head = module.head()
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise BenchError(f"this base's head is a {kind}, no linear layer: use a base with {classes} classes")
    return head


@dataclass(frozen=True)
class Features:
    """What a frozen base makes of a split's images, in place of their pixels; satisfies ``loop.Rows``."""

    values: NDArray[np.float32]  # [images, features]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """The given rows' features, [len(indices), features]."""
        values: NDArray[np.float32] = self.values[indices]
        return values

    def standardise(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Shift and scale every feature to mean 0 and deviation 1, in place; the center and scale taken out.

        A feature that hardly varies is scaled less: divided by its own deviation it would pass on mostly noise.
        """
        center, deviation = self.values.mean(axis=0), self.values.std(axis=0)
        scale = np.maximum(deviation, 0.01 * float(deviation.mean()) or 1.0).astype(np.float32)
        self.values[:] = (self.values - center) / scale
        return center, scale


def features(
    module: Classifier, head: nn.Module, split: Split, device: torch.device, progress: loop.Progress
) -> Features:
    """What ``head``, a layer of ``module``, is given for every image of a split; ``module`` ends in eval mode.

    ``progress`` counts images. Raises BenchError where that is not one vector an image.
    """
    module.eval()
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    rows: list[NDArray[np.float32]] = []
    try:
        with torch.inference_mode():
            for start in range(0, len(split), _BLOCK):
                part = np.arange(start, min(start + _BLOCK, len(split)))
                caught.clear()
                module(torch.from_numpy(split.pixels(part)).to(device))
                if len(caught) != 1 or caught[0].ndim != 2:
                    raise BenchError("this base's head does not see one vector an image: no linear probe can be made")
                rows.append(caught[0].float().cpu().numpy())
                progress(int(part[-1]) + 1, len(split), float("nan"))
    finally:
        hook.remove()
    return Features(np.concatenate(rows), split.labels)
