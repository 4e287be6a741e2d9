"""Linear probes: a new head for a base of other classes, trained on its frozen features of clean images."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
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
from bench.models.base import Classifier, Probe, state_sha256
from bench.models.blueprints import Blueprint
from bench.training import loop, objectives, versions
from bench.training.weights import Weights, cached_training

# Features are standardised first: otherwise a base whose features vary little ends far below logistic regression.
PROBE = Schedule(epochs=20, batch=64, lr=1e-2, weight_decay=0.0, warmup=0.1)
_BLOCK = 64  # images of a forward pass while features are computed


def linear_probe(
    plan: Blueprint,
    module: Classifier,
    train: Split,
    validation: Split,
    device: torch.device,
    progress: loop.Progress,
) -> Probe:
    """Replace the head of ``module`` by one for the card's classes, trained on clean images with all else frozen.

    Trained once and cached. Returns the record: schedule, seconds, validation accuracy (0 to 1), and the number of
    classes before. Raises BenchError where the head is not a linear layer on one vector per image.
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
        "versions": versions.of("clean"),
    }

    def head_state() -> dict[str, Tensor]:
        return {f"{prefix}.{k}": v for k, v in head.state_dict().items()}

    def fit(checkpoint: Path) -> Weights:
        started = time.perf_counter()
        rows = features(module, head, train, device, progress)
        seconds = time.perf_counter() - started
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
            checkpoint=checkpoint,
            progress=progress,
        )
        job.train(head, lambda x, y, draw: job.objective(lambda z, _: head(z), x, y, draw), PROBE)
        with torch.no_grad():  # fold the standardisation into the head
            head.weight.div_(torch.from_numpy(scale).to(device))
            head.bias.sub_(head.weight @ torch.from_numpy(center).to(device))
        accuracy = plan.accuracy(module, validation, device)
        return head_state(), {"probe_seconds": seconds + job.seconds, "probe_validation_clean_accuracy": accuracy}

    trained = cached_training(f"{card.name}-probe", identity, fit)
    tensors.check(f"the probe of base {plan.name}", head_state(), trained.state)
    module.load_state_dict(trained.state, strict=False)
    return {
        "probe": asdict(PROBE),
        "probe_seconds": trained.meta["probe_seconds"],
        "probe_validation_clean_accuracy": trained.meta["probe_validation_clean_accuracy"],
        "probed_from_classes": plan.classes,
    }


def new_head(module: Classifier, classes: int, device: torch.device) -> nn.Linear:
    """Replace the head of ``module`` by a linear layer for ``classes``, always initialised alike, and return it.

    Moves ``module`` to ``device``. Raises BenchError where the head is not one linear layer.
    """
    with globalstate.fixed_rng(0):
        module.model.reset_classifier(classes)  # type: ignore[operator]
    module.to(device)
    head = module.head()
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__
        raise BenchError(f"this base's head is a {kind}, not a linear layer; use a base with {classes} classes")
    return head


@dataclass(frozen=True)
class Features:
    """A frozen base's features of a split, in place of pixels; satisfies ``loop.Rows``."""

    values: NDArray[np.float32]  # [images, features]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Any) -> NDArray[np.float32]:
        """Return the features of the given rows, [len(indices), features]."""
        values: NDArray[np.float32] = self.values[indices]
        return values

    def standardise(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Shift and scale every feature in place to mean 0 and deviation 1; return the center and scale removed.

        A nearly constant feature is scaled less: divided by its own deviation it would be mostly noise.
        """
        center, deviation = self.values.mean(axis=0), self.values.std(axis=0)
        scale = np.maximum(deviation, 0.01 * float(deviation.mean()) or 1.0).astype(np.float32)
        self.values[:] = (self.values - center) / scale
        return center, scale


def features(
    module: Classifier, head: nn.Module, split: Split, device: torch.device, progress: loop.Progress
) -> Features:
    """Compute the inputs of ``head``, a layer of ``module``, for every image of a split; set eval mode.

    ``progress`` counts images. Raises BenchError where the input is not one vector per image.
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
                    raise BenchError(
                        "this base's head does not take one vector per image, so no linear probe can be trained; "
                        "use a base of the card's classes"
                    )
                rows.append(caught[0].float().cpu().numpy())
                progress(int(part[-1]) + 1, len(split), float("nan"))
    finally:
        hook.remove()
    return Features(np.concatenate(rows), split.labels)
