"""Count the votes of a smoothed classifier on each training image: what the objective CAT-RS needs before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.data.split import Split
from bench.interface import Draw
from bench.models.arithmetic import deterministic
from bench.smoothing import noise
from bench.training import loop, objectives
from bench.training.weights import Trained, Weights, cached_training

COPIES, IMAGES = 50, 8  # noisy copies of an image in a step, and images of it
VERSION = 1  # raise it whenever other votes would be counted


@dataclass
class Counts:
    """The votes so far, [images, classes]; satisfies ``interface.Stateful``."""

    votes: Tensor

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"votes": self.votes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.votes.copy_(state["votes"])


def probabilities(
    logits: Callable[[Tensor, Draw], Tensor],
    identity: Mapping[str, Any],
    train: Split,
    classes: int,
    votes: int,
    device: torch.device,
    progress: loop.Progress,
) -> Trained:
    """Count the votes, or load them from the cache; ``state["probabilities"]`` [images, classes] are their fractions.

    Args:
        logits: A trained defense, in eval mode.
        identity: What decides its logits.
        train: The images; the votes are on them as they are, without augmentation.
        classes: Number of classes.
        votes: Of each image, at noise ``objectives.REFERENCE_SIGMA``: a multiple of ``COPIES``.
        device: Where it is computed.
        progress: Shows the steps done.
    """

    def count(checkpoint: Path) -> Weights:
        job = loop.TrainingJob(
            data=train,
            augment=(),
            sigma=objectives.REFERENCE_SIGMA,
            objective=objectives.clean,
            seed=int(identity["seed"]),
            device=device,
            checkpoint=checkpoint,
            progress=progress,
        ).at("confidence")
        counts = Counts(torch.zeros(len(train), classes, dtype=torch.int64, device=device))
        # Whole epochs, so that each image has as many votes; the last batch may begin another.
        steps = -(-len(train) * votes // (COPIES * IMAGES))
        with torch.no_grad(), deterministic():
            for step in job.steps(steps, IMAGES, counts):
                copies = objectives.Copies(step.draw, COPIES)
                found = logits(objectives.noisy(objectives.repeated(step.x, COPIES), copies), copies).argmax(1)
                rows = step.draw.rows.to(device).repeat(COPIES)
                counts.votes.index_put_((rows, found), torch.ones_like(found), accumulate=True)
                step.report(0.0)
        found = counts.votes / counts.votes.sum(1, keepdim=True)
        return {"probabilities": found}, {"train_seconds": job.seconds}

    decided = {
        **identity,
        "votes": votes,
        "version": VERSION,
        "train": train.sha256(),
        "noise": noise.VERSION,
        "loop": loop.VERSION,
        "device": device.type,
    }
    return cached_training("confidence", {"smoothed predictions": decided}, count)
