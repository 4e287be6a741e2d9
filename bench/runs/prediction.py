"""The smoothed classifier of a finished run, for pictures that are not in its record (``bench predict``).

The run is rebuilt from its record as ``bench verify`` does. A certificate holds for a picture that was chosen before
the noise was drawn: its chance to be wrong, over the noise, is at most alpha. So the noise must not depend on the
picture, and its seed is new at each call unless one is given. All pictures of a call get the same noise; a picture's
answer then depends on the seed alone, not on the pictures beside it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.data.given import GivenPicture, read_array, read_picture
from bench.data.split import Split
from bench.errors import BenchError
from bench.models.arithmetic import deterministic
from bench.records.record import Record
from bench.runs.identity import make_task
from bench.runs.plan import make_procedure
from bench.runs.rebuilding import rebuild_checked
from bench.runs.redraw import Rebuilt
from bench.runs.session import Session
from bench.smoothing.engine import certify
from bench.smoothing.noise import Noise
from bench.smoothing.procedures import Procedure
from bench.smoothing.votes import Certificate, Decision

SPLIT = "predict"  # the split in the keys of the noise: no card's split has this name, so no run has this noise


@dataclass(frozen=True, kw_only=True)
class Prediction(Decision):
    """What the smoothed classifier says of one picture: the decision of the votes, and its origin.

    Attributes:
        predicted: The number of its class; None: abstained.
        radius: Certified l2 radius between images with pixels in [0, 1]; 0 where it abstains.
        n0: Votes that selected the class.
        n: Votes that bound its probability.
        top_count: Those for the selected class.
        runner_up: The class with most of the other votes.
        runner_up_count: Its votes.
        p_lower: Lower bound of the selected class's probability.
        votes: All votes that were drawn.
        picture: Its file, or its place among the arrays given.
        name: The name of its class.
        seed: Of the noise.
        changes: How decoding changed what the file shows.
        fitted: How the picture was fitted to the card; the radius then holds for the fitted picture.
    """

    picture: str
    name: str | None
    seed: int
    changes: tuple[str, ...] = ()
    fitted: tuple[str, ...] = ()

    def holds(self, radius: float) -> bool:
        """Return whether the prediction is certified at a radius."""
        return self.predicted is not None and self.radius >= radius


@dataclass(frozen=True)
class Sampling:
    """How votes are drawn; None: as the run drew them.

    ``radius``: the radius that is asked for. An anytime run then tests it alone, in place of the run's radii.
    """

    n0: int | None = None
    n: int | None = None
    alpha: float | None = None
    radius: float | None = None

    def procedure(self, record: Record) -> Procedure:
        """Return the run's procedure with these numbers. Raises BenchError for one out of range."""
        own = record.identity.sampling
        given = (("--n0", self.n0, Integral), ("--n", self.n, Integral), ("--alpha", self.alpha, Real))
        for flag, value, kind in given:
            if value is not None and not isinstance(value, kind):  # from Python it may be anything
                raise BenchError(f"{flag} {value!r}: must be a {'whole ' if kind is Integral else ''}number")
        n0 = (own.n0 or 1) if self.n0 is None else self.n0
        n = own.n if self.n is None else self.n
        alpha = own.alpha if self.alpha is None else self.alpha
        radii = (self.radius,) if self.radius else tuple(own.radii)
        made = make_procedure(own.kind, "selected", n0, n, alpha, radii)
        if self.radius is not None:
            if not 0 <= self.radius < math.inf:  # NaN is not
                raise BenchError(f"--radius {self.radius:g}: must be a number from 0 up")
            reach = made.largest_radius(record.identity.sigma, record.identity.noise.tau)
            if self.radius > reach:
                raise BenchError(
                    f"--radius {self.radius:g}: out of reach at sigma {record.identity.sigma:g}, n {n} and alpha "
                    f"{alpha:g}, where all votes for one class certify {math.floor(reach * 1e4) / 1e4:g}; raise --n, "
                    f"or use a run of a larger sigma"
                )
        return made


class SmoothedModel:
    """The smoothed classifier of a run: a callable from a picture to its ``Prediction``."""

    def __init__(self, record: Record, rebuilt: Rebuilt, procedure: Procedure) -> None:
        """Use ``open_model`` to make one."""
        self.record, self.procedure = record, procedure
        self._rebuilt = rebuilt
        self.card = rebuilt.run.plan.card

    @property
    def sigma(self) -> float:
        """The noise of the votes, in pixels of [0, 1]."""
        return self.record.identity.sigma

    def __call__(self, picture: Any, *, fit: str | None = None, seed: int | None = None) -> Prediction:
        """Predict one picture.

        Args:
            picture: A file, or an array or tensor [C, H, W]: integers 0 .. levels-1, or pixels in [0, 1].
            fit: How a picture off the card's shape or grid is fitted: "levels" or "resize-crop"; None refuses it.
            seed: Of the noise. A new random one by default: with a seed known beforehand, pictures can be sought that
                the drawn votes get wrong.

        Raises:
            BenchError: The picture is unreadable, or not on the card's shape and grid.
        """
        return self.predict([picture], fit=fit, seed=seed)[0]

    def predict(
        self,
        pictures: Iterable[Any],
        *,
        fit: str | None = None,
        seed: int | None = None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Prediction]:
        """Predict pictures, with one seed; see ``__call__``. All are read before the first vote.

        ``progress`` is called with (pictures done, predictions that are certified).
        """
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
            raise BenchError(f"--seed {seed}: must be a whole number from 0")
        seed = secrets.randbits(62) if seed is None else int(seed)
        given = [self._read(picture, place, fit) for place, picture in enumerate(pictures)]
        noise, found = Noise(seed, SPLIT), list[Prediction]()
        for one in given:
            found.append(self._prediction(one, self.certificate(one, noise), seed))
            progress(len(found), sum(p.predicted is not None for p in found))
        return found

    def _read(self, picture: Any, place: int, fit: str | None) -> GivenPicture:
        if isinstance(picture, str | Path):
            return read_picture(self.card, Path(picture), fit)
        return read_array(self.card, picture, f"picture {place}", fit)

    def certificate(self, picture: GivenPicture, noise: Noise, index: int = 0) -> Certificate:
        """Draw a picture's votes with the noise of image ``index`` of a (seed, split)."""
        run, plan = self._rebuilt.run, self._rebuilt.run.plan
        alone = Split(SPLIT, picture.integers[None], np.array([-1]), plan.card.levels)
        task = make_task(plan, alone, run.task.device, noise, run.task.block)
        pixels = task.images([0])
        task = replace(task, images=lambda indices: np.repeat(pixels, len(indices), axis=0), labels=lambda _: -1)
        tau = self.record.identity.noise.tau
        with deterministic(), torch.inference_mode():
            device = replace(self._rebuilt.certifier.device, task=task)
            (found,) = certify([device], lambda label: self.procedure.certify(plan.sigma, label, tau), [index])
        return found

    def _prediction(self, picture: GivenPicture, c: Certificate, seed: int) -> Prediction:
        return Prediction(
            **{f.name: getattr(c, f.name) for f in fields(Decision)},
            picture=picture.name,
            name=None if c.predicted is None else self.card.classes[c.predicted],
            seed=seed,
            changes=picture.changes,
            fitted=picture.fitted,
        )


def open_model(
    record: Record,
    session: Session,
    sampling: Sampling | None = None,
    defense: str | None = None,
    base: str | None = None,
) -> SmoothedModel:
    """Rebuild the smoothed classifier of a finished run.

    Weights that are not in the cache are trained again, which a note says.

    Args:
        record: As ``finished`` returns it.
        session: Its device, and where progress is shown.
        sampling: Numbers of votes and alpha, where they differ from the run's.
        defense: The defense's file, which is run only where the user names it.
        base: Address of a served base, which is asked only where the user names it.

    Raises:
        BenchError: A number is out of range, or the certified function cannot be rebuilt here.
    """
    procedure = (sampling or Sampling()).procedure(record)
    return SmoothedModel(record, rebuild_checked(record, session, defense, base), procedure)
