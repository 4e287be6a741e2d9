"""Votes, from request to certificate: the types that procedures, scheduler, engine and records share.

A vote is the class that the model predicts for one noisy copy of an image. A procedure requests votes, the scheduler
packs requests into batches, the engine draws them, and the procedure turns their counts into a decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

# Bounds at more votes take seconds each, and hours to check at high precision.
MAX_VOTES = 10**9

# Votes are placed in tiles: a vote's row within its tile is its number modulo TILE. Matrix kernels were measured to
# change a row's last bits with its alignment, so a row that moves freely could change its vote with the packing.
# Sixteen float32 are one cache line, the widest alignment a kernel asks for.
TILE = 16

Counts = NDArray[np.int64]  # votes by class; the last entry counts votes whose logits hold NaN
Voted = NDArray[np.int64]  # the class of each row; NaN logits count as a class after the last

# The class whose probability is bounded: selected on votes of its own (what a deployed model can do), or
# the known label (all that a benchmark's certified accuracy needs). With "correct" it is selected, and an image
# whose class is not the label, which cannot count as certified, gets no further votes.
Target = Literal["selected", "label", "correct"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class VoteRequest:
    """A procedure's request for ``count`` more votes of a purpose, numbered on from the previous ones.

    ``later`` bounds the votes of that purpose that may be requested afterwards: an engine with spare rows may draw
    them speculatively. Votes that are drawn but never requested decide nothing.
    """

    purpose: str
    count: int
    later: int = 0


@dataclass(frozen=True)
class Decision:
    """A procedure's conclusion about one image; ``predicted`` is None and the radius 0 if it abstains.

    ``n``, ``top_count`` and the runner-up belong to the decisive look, which determines the radius; ``votes`` is the
    image's total, selection included. ``n`` is 0 if the procedure stopped after selecting a wrong class (``stop``).
    """

    predicted: int | None
    radius: float
    n0: int
    n: int
    top_count: int
    runner_up: int | None
    runner_up_count: int
    p_lower: float
    votes: int


@dataclass(frozen=True)
class Certificate(Decision):
    """One image's line in the record; the radius is an l2 distance between images with pixels in [0, 1]."""

    index: int = -1
    label: int = -1
    seconds: float = 0.0


class ImageProcedure(Protocol):
    """A certification procedure at work on one image: it requests votes until their counts decide.

    It sees counts only, neither images nor noise, so its error probability is a statement of pure statistics.
    """

    def first(self) -> VoteRequest:
        """Return the first request."""
        ...

    def update(self, counts: Counts) -> VoteRequest | Decision:
        """Take the counts of the votes requested last; return the next request, or the decision."""
        ...


class Span(NamedTuple):
    """Rows of a batch in whole tiles: consecutive votes of one image and purpose, from number ``first``."""

    purpose: str
    image: int
    first: int
    rows: int


@dataclass(frozen=True)
class Batch:
    """Votes that one worker draws together; ``number`` identifies its answer."""

    number: int
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """The number of votes to draw."""
        return sum(s.rows for s in self.spans)


def stop(top: int, n0: int) -> Decision:
    """Make the decision for an image whose selected class is wrong: a prediction that no votes bound."""
    return Decision(top, 0.0, n0, 0, 0, None, 0, 0.0, n0)


def decide(top: int, counts: Counts, n0: int, n: int, votes: int, p_lower: float, radius: float) -> Decision:
    """Make the decision for class ``top``; NaN can be the runner-up, numbered as the class after the last."""
    others = counts.copy()
    others[top] = -1
    second = int(others.argmax())
    return Decision(
        predicted=top if p_lower > 0.5 else None,
        radius=radius,
        n0=n0,
        n=n,
        top_count=int(counts[top]),
        runner_up=second if others[second] > 0 else None,
        runner_up_count=int(others[second]),
        p_lower=p_lower,
        votes=votes,
    )
