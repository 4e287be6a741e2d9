"""Test certificates on fresh noise, and compare votes that were drawn twice.

A certificate is a statement about F on fresh Gaussian noise. A defense that recognises its votes, by the key of a
draw, by the noise of a seed or by the other rows of a block, shows other counts once votes come with a new random
seed, mixed over images in a random order, with draws whose keys have nothing to do with the image.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from bench.models.arithmetic import deterministic
from bench.smoothing.anytime import Anytime, schedule
from bench.smoothing.bounds import interval
from bench.smoothing.engine import Device
from bench.smoothing.fixed import Fixed
from bench.smoothing.noise import Noise, Vote, VoteDraw
from bench.smoothing.rows import Rows
from bench.smoothing.threads import share_out
from bench.smoothing.votes import Batch, Certificate, Voted

LEVEL = 1e-6  # chance that the audit of an honest record fails
VOTES = 512  # fresh votes an image, at most
IMAGES = 32  # images at the end of a run, at most
SHARE = 0.02  # of a run's votes that its audit may cost; at least one block of them is drawn
DEEP = 500  # images of bench verify --fresh, at most


@dataclass(frozen=True)
class Audit:
    """A test on fresh noise: the images, the votes of each, and the seed of the noise."""

    claims: dict[int, int]  # image -> the class that it is certified for
    votes: int  # of each image
    seed: int

    @property
    def noise(self) -> Noise:
        """The noise to make the audit's task with."""
        return Noise(self.seed, "audit")

    def record(self) -> dict[str, Any]:
        """Return the passed audit as run.json keeps it."""
        return {"images": sorted(self.claims), "votes": self.votes, "seed": self.seed, "level": LEVEL}


def audit_of_run(certificates: Sequence[Certificate], block: int) -> Audit | None:
    """Choose a few random images of a finished run, within ``SHARE`` of its votes. None: no image is certified."""
    share = int(SHARE * sum(c.votes for c in certificates))
    votes = max(block, share // block * block)
    images = max(1, min(4, votes // 64), min(IMAGES, votes // VOTES))
    return audit_of(certificates, images, min(VOTES, votes // images))


def audit_of(certificates: Sequence[Certificate], images: int, votes: int) -> Audit | None:
    """Choose at most ``images`` random images with a prediction that votes bound: no other one claims anything."""
    claims = {c.index: c.predicted for c in certificates if c.predicted is not None and c.n}
    if not claims:
        return None
    seed = secrets.randbits(62)
    chosen = np.random.default_rng(seed).permutation(sorted(claims))[:images].tolist()
    return Audit({i: claims[i] for i in chosen}, votes, seed)


def draw(device: Device, audit: Audit, pixels: Mapping[int, NDArray[Any]]) -> dict[int, int]:
    """Count the fresh votes of each image for its class. ``device.task`` draws the audit's own noise."""
    task, rng = device.task, np.random.default_rng([audit.seed, 1])
    indices, here = list(audit.claims), device.task.device
    images = torch.from_numpy(np.stack([pixels[i] for i in indices])).to(here)
    places = {index: place for place, index in enumerate(indices)}
    rows = [(i, vote) for i in indices for vote in range(audit.votes)]
    rows = [rows[j] for j in rng.permutation(len(rows))]
    hits = dict.fromkeys(indices, 0)
    lock = threading.Lock()
    other = Noise(int(rng.integers(2**62)), "audit-draw")
    beyond = max(indices) + 2  # keys of draws name images at random, mostly others
    keys = [Vote("estimate", int(rng.integers(beyond)), int(rng.integers(2**30))) for _ in rows]

    def count(model: Callable[..., torch.Tensor], begin: int) -> None:
        part, draws = rows[begin : begin + task.block], keys[begin : begin + task.block]
        used = len(part)
        part, draws = part + part[:1] * (task.block - used), draws + draws[:1] * (task.block - used)
        votes = [Vote("estimate", *row) for row in part]
        x = task.noisy(images, Rows.of_votes(votes, [places[v.image] for v in votes], here))
        classes = task.classes_of(model(x, VoteDraw(other, draws, task.sigma, here))).cpu().tolist()
        with lock:
            for (i, _), found in zip(part[:used], classes[:used], strict=True):
                hits[i] += found == audit.claims[i]

    with deterministic(), torch.inference_mode():
        share_out(device.models, range(0, len(rows), task.block), count)
    return hits


def overstated(
    procedure: Fixed | Anytime, audit: Audit, hits: Mapping[int, int], certificates: Sequence[Certificate]
) -> str:
    """Describe the first image whose record shows more votes for its class than fresh noise does; empty: none does.

    An honest record fails with a chance of at most ``LEVEL``, whatever its images' probabilities.
    """
    level = LEVEL / len(audit.claims)
    for c in certificates:
        if c.index in hits and fewer((hits[c.index], audit.votes), (c.top_count, c.n), procedure, level):
            return (
                f"image {c.index} has {hits[c.index]} of {audit.votes} votes for class {c.predicted} on fresh noise, "
                f"where the record says {c.top_count} of {c.n}"
            )
    return ""


def fewer(fresh: tuple[int, int], recorded: tuple[int, int], procedure: Fixed | Anytime, level: float) -> bool:
    """Test whether ``fresh`` (hits, votes) shows a lower probability than the ``recorded`` decisive look.

    True with a chance of at most ``level`` where both have the same probability. At a fixed number of votes Fisher's
    exact test, one-sided. An anytime look is chosen by its own counts, so there the upper Clopper-Pearson bound of the
    fresh votes must lie below the lower bound of the look, which holds at every look at once (a union bound).
    """
    (h, m), (top, n) = fresh, recorded
    if isinstance(procedure, Fixed):
        return bool(stats.hypergeom.cdf(h, m + n, h + top, m) <= level)
    looks = len(schedule(procedure))
    upper = interval(h, m, 1 - level)[1]
    lower = interval(top, n, 1 - level / looks)[0]
    return upper < lower


def contradiction(old: Certificate, new: Certificate, procedure: Fixed | Anytime, exactly: bool, level: float) -> str:
    """Describe how a certificate drawn again contradicts the recorded one; empty where it does not.

    ``exactly``: all but seconds must be equal. Else the counts are compared as two samples, at ``level``.
    """
    if exactly:
        same = {**asdict(old), "seconds": 0.0} == {**asdict(new), "seconds": 0.0}
    else:
        same = not (
            fewer(_most(old, procedure), (new.top_count, new.n), procedure, level / 2)
            or fewer(_most(new, procedure), (old.top_count, old.n), procedure, level / 2)
        )
    return "" if same else f"image {new.index}: {_votes(new)}, not {_votes(old)}"


def _most(c: Certificate, procedure: Fixed | Anytime) -> tuple[int, int]:
    """Return the most votes that a certificate allows for its class, and of how many.

    Where target "correct" stopped, the label had no more of the votes of the selection than the class selected.
    """
    return (c.top_count, c.n) if c.n else (procedure.n0 // 2, procedure.n0)


def _votes(c: Certificate) -> str:
    return f"label {c.label}, predicted {c.predicted}, {c.top_count} of {c.n} votes"


class BatchSample:
    """The first block of one batch, each batch seen with the same chance, to be drawn again at the end of a run."""

    def __init__(self, block: int) -> None:
        self._block, self._seen = block, 0
        self.kept: tuple[Batch, Voted] | None = None

    def see(self, batch: Batch, voted: Voted) -> None:
        """Note a batch that is counted (reservoir sampling)."""
        self._seen += 1
        if secrets.randbelow(self._seen) == 0:
            self.kept = self._first_block(batch), voted[: self._block]

    def _first_block(self, batch: Batch) -> Batch:
        spans, left = [], self._block
        for span in batch.spans:
            spans.append(span._replace(rows=min(span.rows, left)))
            left -= spans[-1].rows
            if not left:
                break
        return Batch(batch.number, tuple(spans))
