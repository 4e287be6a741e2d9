"""The numbers of ``bench inspect``: what each is, where its definition is from, and how it is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.inspection.cam import TOP
from bench.inspection.gradients import MOVE, STEP
from bench.inspection.intervals import Interval


@dataclass(frozen=True)
class Number:
    """One number of a run."""

    key: str
    title: str
    definition: str
    source: str
    least: float = -math.inf
    most: float = math.inf


_CAM = "Selvaraju et al. 2017, arXiv 1610.02391, as computed by the package grad-cam"
_CAM += "; the overlap is certbench's own number"
_ALIGNED = "Srinivas, Bordt and Lakkaraju 2023, arXiv 2305.19101"
_CODE = "their released code, github.com/tml-tuebingen/pags at 6107ed4"

MANIFOLD_RATIO = Number(
    "manifold_ratio",
    "off-manifold robustness",
    "Mean change on the manifold divided by mean change off it. Above 1: more robust off the manifold than on it, "
    "which that paper holds to be why gradients look like images.",
    f"{_ALIGNED}, by {_CODE}, notebooks/MNISTDistractor.ipynb (the figure of relative noise robustness)",
)
NUMBERS = (
    Number(
        "cam_iou",
        f"Grad-CAM: overlap of the top {TOP:.0%}",
        f"Intersection over union of the {TOP:.0%} highest pixels of the clean image's map and of a noisy copy's. "
        f"1: the same pixels; 0: none in common; {TOP / (2 - TOP):.2f}: about that of two unrelated maps.",
        _CAM,
        least=0,
        most=1,
    ),
    Number(
        "cam_correlation",
        "Grad-CAM: correlation",
        "Pearson correlation of the pixels of the clean image's map and of a noisy copy's.",
        _CAM,
        least=-1,
        most=1,
    ),
    Number("loss", "loss", "Cross-entropy of the label at a noisy copy, in nats.", "the usual one", least=0),
    Number(
        "gradient_norm",
        "gradient norm",
        "l2 norm of the gradient of that loss by the pixels, at a noisy copy: loss per unit of l2 distance.",
        "the usual one",
        least=0,
    ),
    Number(
        "curvature",
        "curvature",
        f"Second derivative of the loss along its own gradient at a noisy copy, by a central difference of gradients "
        f"with a step of {STEP:g} sigma. Positive: the loss rises faster than its gradient says.",
        "after Moosavi-Dezfooli et al. 2019, arXiv 1811.09716, who penalise the change of the gradient along its sign",
    ),
    Number(
        "score_cosine",
        "alignment, label",
        "Cosine of the angle between the gradient of the label's log-probability by the pixels and the denoiser's "
        "score (D(x) - x) / sigma^2, at a noisy copy x.",
        f"after {_ALIGNED}, who compare gradients with the score of a diffusion model by LPIPS, not by the cosine",
        least=-1,
        most=1,
    ),
    Number(
        "score_cosine_sum",
        "alignment, all logits",
        "The same for the gradient of the sum of all logits, which is compared with an unconditional score there.",
        f"{_CODE}, experiments/measure_score_alignment.py",
        least=-1,
        most=1,
    ),
    Number(
        "change_on",
        "change on the manifold",
        f"l1 distance of the class probabilities at a noisy copy and after a step of {MOVE:g} sigma along the "
        "denoiser's Jacobian times a Gaussian vector u, which keeps the directions in which the clean image may vary.",
        f"{_CODE}, experiments/measure_manifold_robustness.py; there u is projected on the tangent space of an "
        "autoencoder at the clean image",
        least=0,
        most=2,
    ),
    Number(
        "change_off",
        "change off the manifold",
        f"The same for a step of {MOVE:g} sigma along the rest of u.",
        "as the one before",
        least=0,
        most=2,
    ),
    MANIFOLD_RATIO,
)


def printed(one: Interval) -> str:
    """Return a number with its interval, with three digits; a dash where there is none."""
    if one.value is None:
        return "—"
    if one.low is None or one.high is None:
        return f"{one.value:.3g}"
    return f"{one.value:.3g} [{one.low:.3g}, {one.high:.3g}]"
