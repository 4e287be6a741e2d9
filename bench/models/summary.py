"""Report a run's base: its preprocessing, its order of classes, and what loading changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy.special import bdtrc

from bench.data.split import Split
from bench.errors import shown
from bench.models.base import BaseModel, LocalBase

_IMAGES = 100  # images on which clean accuracy is compared with guessing
_LIKELY = 0.05  # p-value above which an accuracy may be due to guessing


def report_base(
    base: BaseModel, validation: Split, say: Callable[[str], None], warn: Callable[[str], None], better: str = ""
) -> None:
    """Report how the base preprocesses images; warn where its validation accuracy is no better than guessing.

    A served base gives no such information, and no request is sent to it. ``better`` is printed with the accuracy of
    a base that was trained here: how to get a better one.
    """
    if not isinstance(base, LocalBase):
        return
    say(shown(describe(base)))
    if better and "validation_clean_accuracy" in base.meta:
        share = base.meta["validation_clean_accuracy"]
        say(shown(f"base {base.name} classifies {share:.1%} of the clean validation images correctly; {better}"))
    if base.untrained_weights:
        return
    if base.classes < 2 or int(validation.labels.max()) >= base.classes or "trained_on_classes" in base.meta:
        return  # a base of another task
    right, total = base.accuracy(validation, list(range(min(_IMAGES, len(validation)))))
    if may_be_guessing(right, total, base.classes):
        warn(
            f"base {shown(base.name)} classifies {right} of {total} clean validation images correctly, no better than "
            f"guessing among {base.classes} classes: compare its input size, mean, std and order of classes, listed "
            f"above, with those of its training"
        )


def may_be_guessing(right: int, total: int, classes: int) -> bool:
    """Return whether guessing may reach this accuracy, and it is less than half way from chance to 100%."""
    return bool(bdtrc(right - 1, total, 1 / classes) > _LIKELY) and right / total < (1 + 1 / classes) / 2


def describe(base: LocalBase) -> str:
    """Return one line: size, resampling, mean and std with their sources; order of classes; changes on loading."""
    seen, source = base.meta["preprocessing"], base.meta.get("source", {})
    given, size = ("x".join(map(str, seen[key])) for key in ("from", "size"))
    parts = [f"{given} images are not resized"]
    if seen["resampling"]:
        sources = f"size: {seen['size_from']}; interpolation: {seen['resampling_from']}"
        parts = [f"{given} images are resized to {size}, {seen['resampling']} ({sources})"]
    parts.append(
        f"mean {_numbers(seen['mean'])}, std {_numbers(seen['std'])} (from {seen['normalisation_from']})",
    )
    parts += [base.meta["classes"]] if "classes" in base.meta else []
    parts += ["not trained, since only its architecture is used"] if base.untrained_weights else []
    return f"base {base.name}: " + "; ".join(parts + source.get("remarks", []))


def _numbers(values: Sequence[float]) -> str:
    found = [f"{v:.4g}" for v in values]
    return found[0] if len(set(found)) == 1 else " ".join(found)
