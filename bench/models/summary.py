"""What a run states about its base before anything else: how it sees an image, and what was not as it was stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy.special import bdtrc

from bench.data.split import Split
from bench.errors import shown
from bench.models.base import BaseModel, LocalBase

_IMAGES = 100  # on which clean accuracy is compared with guessing
_LIKELY = 0.05  # a base that guesses is right at least that often with this probability


def report_base(base: BaseModel, validation: Split, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Say how the base sees an image; warn where it is right on validation images no more often than by guessing.

    A served base states nothing of itself and is not asked.
    """
    if not isinstance(base, LocalBase):
        return
    say(shown(described(base)))
    if base.classes < 2 or int(validation.labels.max()) >= base.classes or "trained_on_classes" in base.meta:
        return  # a base of another task
    right, total = base.accuracy(validation, list(range(min(_IMAGES, len(validation)))))
    if guesses(right, total, base.classes):
        warn(
            f"base {shown(base.name)} is right on {right} of {total} clean validation images, which guessing among "
            f"{base.classes} classes can reach too: compare its input size, mean, std and order of classes, as stated "
            f"above, with those it was trained with"
        )


def guesses(right: int, total: int, classes: int) -> bool:
    """Whether ``right`` of ``total`` are what guessing may reach, and less than half way from that to all."""
    return bool(bdtrc(right - 1, total, 1 / classes) > _LIKELY) and right / total < (1 + 1 / classes) / 2


def described(base: LocalBase) -> str:
    """One line: size, resampling, mean and std, and where they come from; order of classes; changes on loading."""
    seen, source = base.meta["preprocessing"], base.meta.get("source", {})
    given, size = ("x".join(map(str, seen[key])) for key in ("from", "size"))
    parts = [f"{given} images are taken as they are"]
    if seen["resampling"]:
        other = seen["config_resampling"] not in (None, seen["resampling"])
        than = f", where its config has {seen['config_resampling']}" if other else ""
        parts = [f"{given} images are resized to {size}, {seen['resampling']}{than} (size: {seen['size_from']})"]
    parts.append(
        f"mean {_numbers(seen['mean'])}, std {_numbers(seen['std'])} (from {seen['normalisation_from']})",
    )
    parts += [base.meta["classes"]] if "classes" in base.meta else []
    return f"base {base.name}: " + "; ".join(parts + source.get("remarks", []))


def _numbers(values: Sequence[float]) -> str:
    found = [f"{v:.4g}" for v in values]
    return found[0] if len(set(found)) == 1 else " ".join(found)
