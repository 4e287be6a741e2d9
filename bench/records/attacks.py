"""The attacks on a finished run, ``attacks.jsonl`` beside its certificates: what is tried, and what each image showed.

A section is a header with the settings of an attack, and a line for each image. A line names its section, so sections
of several attacks may alternate. Lines are appended as images are done; an incomplete last line is ignored and redone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError

from bench.errors import BenchError, one_line
from bench.io import limits
from bench.io.files import digest
from bench.records import metrics
from bench.records.columns import column
from bench.records.metrics import Rate
from bench.records.record import Record
from bench.records.schema import Environment
from bench.records.stored import Amount, Open, Positive, Radii, Stored, Votes, Whole, parse_json
from bench.smoothing import bounds

NAME = "attacks.jsonl"
COMPRESSED = NAME + limits.GZIP
VERSION = 1  # of what an attack computes: raise it whenever the same settings would give other images
LINE = 2**24  # maximum bytes of a line: the header holds the index of each image

By = Literal["clean", "pgd", "query", "step", "noise", "unbounded"]
Outcome = Literal["attacked", "abstained", "held"]
Count = Annotated[int, Field(ge=1, le=10**9)]


class AttackSettings(Stored):
    """All that decides the result of an attack: its identity."""

    version: Annotated[int, Field(ge=1)]
    run: str  # hash of the attacked run's identity
    certificates: str | None  # hash of its certificates
    preset: str
    radii: Radii  # of the balls that are searched, l2 between images with pixels in [0, 1]
    checked: Positive  # the radius of the attacks that serve only to detect masked gradients
    indices: Annotated[list[Whole], Field(min_length=1)]
    white_box: bool  # whether gradients reach the image, so that pgd is run
    steps: Count
    draws: Count  # noise draws of a step
    restarts: Count
    query_steps: Count
    query_pairs: Count  # pairs of noise draws of a step
    n: Votes
    alpha: Open

    @cached_property
    def sha256(self) -> str:
        """The hash of the settings; its first 8 digits name the section."""
        return digest(self.as_json())

    @property
    def name(self) -> str:
        """The name of the section."""
        return self.sha256[:8]

    @validator(mode="after")
    def _consistent(self) -> Self:
        rising = all(0 < a < b for a, b in zip([0, *self.radii], self.radii, strict=False) if a)
        if not rising or self.radii[0] <= 0 or self.checked not in self.radii:
            raise PydanticCustomError("attack", "radii must rise from above 0, and hold the one checked")
        if len(set(self.indices)) != len(self.indices):
            raise PydanticCustomError("attack", "indices: an image is there twice")
        return self

    @property
    def budget(self) -> str:
        """The effort in words, without which a result of an attack means nothing."""
        query = f"query {self.query_steps} steps x {self.query_pairs} pairs of draws"
        starts = "1 start" if self.restarts == 1 else f"{self.restarts} starts"
        pgd = f"PGD {self.steps} steps x {self.draws} draws x {starts}"
        searched = f"{pgd}, {query}" if self.white_box else f"{query} (no gradients)"
        return f"{searched}; decided on {self.n:,} votes at alpha {self.alpha:g}"

    @property
    def effort(self) -> int:
        """Passes of an image through the defense spent on one radius; orders attacks by strength."""
        pgd = 2 * self.steps * self.draws * self.restarts if self.white_box else 0
        return pgd + 2 * self.query_steps * self.query_pairs


class Result(Stored):
    """A decision by fresh votes on one attacked image, or on the clean one."""

    by: By
    radius: Amount | None  # of the ball that was searched; None: the whole range of images
    distance: Amount  # l2 between attacked and clean image, rounded up
    predicted: Whole | None  # None: the votes decide nothing
    top_count: Whole
    runner_up_count: Whole


class Alarm(Stored):
    """A decision that contradicts the run's certificate, and a second one on further votes."""

    by: By
    distance: Amount
    certified: Whole  # the class that the run certifies
    radius: Amount  # its certified radius
    predicted: Whole  # the class decided inside that radius
    redrawn: Whole | None  # the class that a second decision gives; None: it decides nothing
    files: list[str]  # the pair of images, below the run folder

    @property
    def confirmed(self) -> bool:
        """Whether the second decision contradicts the certificate too."""
        return self.redrawn is not None and self.redrawn != self.certified


class AttackedImage(Stored):
    """One image's line."""

    attack: str
    index: Whole
    label: Whole
    results: Annotated[list[Result], Field(min_length=1)]
    gradients: Whole  # gradients computed
    zero: Whole  # those that are zero or not finite
    alarms: list[Alarm]

    def outcome(self, radius: float, by: By | None = None) -> Outcome:
        """Say what the decisions within a radius showed; ``by``: those of one attack, and the clean one.

        "attacked": one says another class than the label. Else "abstained": one says none. Else "held".
        """
        within = [r for r in self.results if r.distance <= radius and (by in (None, r.by) or r.by == "clean")]
        if any(r.predicted not in (None, self.label) for r in within):
            return "attacked"
        return "abstained" if any(r.predicted is None for r in within) else "held"

    def result(self, by: By) -> Result | None:
        """Return the last decision of one attack; None where it was not run."""
        return next((r for r in reversed(self.results) if r.by == by), None)


@dataclass(frozen=True)
class Attack:
    """A section as read: settings, machine, and the images done so far."""

    settings: AttackSettings
    environment: Environment
    images: list[AttackedImage] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every image of the settings is done."""
        return len(self.images) == len(self.settings.indices)

    @property
    def alarms(self) -> list[tuple[AttackedImage, Alarm]]:
        """All contradictions of certificates, with their images."""
        return [(image, alarm) for image in self.images for alarm in image.alarms]

    def count(self, outcome: Outcome, radius: float, by: By | None = None) -> int:
        """Count the images with an outcome at a radius."""
        return sum(image.outcome(radius, by) == outcome for image in self.images)

    def attacked_accuracy(self, radius: float) -> Rate:
        """Return the share of images for which no other class was decided within the radius.

        The share of images on which the smoothed classifier is right in the whole ball is at most this, up to alpha.
        """
        return rate(len(self.images) - self.count("attacked", radius), len(self.images))

    def abstained(self, radius: float) -> Rate:
        """Return the share of images counted in ``attacked_accuracy`` on which some decision abstained."""
        return rate(self.count("abstained", radius), len(self.images))

    def certified(self, record: Record, radius: float) -> Rate:
        """Return the certified accuracy of the attacked images."""
        done = {image.index for image in self.images}
        earned = metrics.earned(record.certificates)
        indices = column(record.certificates, "index").tolist()
        held = sum(bool(r >= radius) for i, r in zip(indices, earned.tolist(), strict=True) if i in done)
        return rate(held, len(done))


def rate(count: int, total: int) -> Rate:
    """Return a share with its 95% Clopper-Pearson interval."""
    return Rate(count, count / total if total else 0.0, *bounds.interval(count, total))


def attacks_file(folder: Path) -> Path:
    """Return a run's file of attacks, which need not exist. Raises BenchError where there are two."""
    plain, compressed = folder / NAME, folder / COMPRESSED
    if plain.exists() and compressed.exists():
        raise BenchError(f"{folder} has {NAME} and {COMPRESSED}, which may differ; move one of them away")
    return compressed if compressed.exists() else plain


def read(folder: Path) -> list[Attack]:
    """Read all attacks on a run, in the order in which they began; none where there is no file.

    Raises BenchError where the file is not as bench writes it.
    """
    file, found = attacks_file(folder), dict[str, Attack]()
    if not file.exists():
        return []
    try:
        for number, line in enumerate(limits.lines(file, LINE), 1):
            if not line.endswith(b"\n"):  # torn by a crash
                break
            try:
                _add(found, parse_json(line))
            except (BenchError, ValueError, RecursionError) as e:
                reason = e if isinstance(e, BenchError) else one_line(e)
                raise BenchError(f"{file}:{number}: not a line of an attack: {reason}; move the file away") from None
    except OSError as e:
        raise BenchError(f"{file}: unreadable: {one_line(e)}") from None
    return list(found.values())


def _add(found: dict[str, Attack], value: Any) -> None:
    if not isinstance(value, dict):
        raise BenchError("no JSON object")
    if "settings" in value:
        settings = AttackSettings.of(value["settings"])
        if value.get("attack") != settings.name or settings.name in found:
            raise BenchError("a header of another attack, or one that is there twice")
        found[settings.name] = Attack(settings, Environment.of(value.get("environment") or {}))
        return
    image = AttackedImage.of(value)
    attack = found.get(image.attack)
    if attack is None:
        raise BenchError("an image before the header of its attack")
    done = len(attack.images)
    if attack.complete or attack.settings.indices[done] != image.index:
        raise BenchError(f"image {image.index} is not the next one of its attack")
    attack.images.append(image)


def of_run(record: Record) -> tuple[list[Attack], str]:
    """Return the attacks on exactly this record, and a line on those that are of others or unfinished; empty: none."""
    found = read(record.path)
    own = [a for a in found if a.settings.run == record.identity.sha256]
    own = [a for a in own if a.settings.certificates == record.info.certificates_sha256]
    done = [a for a in own if a.complete]
    others, unfinished = len(found) - len(own), len(own) - len(done)
    lines = [
        f"{others} of other certificates than the run's" if others else "",
        f"{unfinished} unfinished; repeat bench attack to finish it" if unfinished else "",
    ]
    text = "; ".join(filter(None, lines))
    return done, f"{record.path.name}: attacks left out: {text}" if text else ""


def strongest(attacks: Iterable[Attack]) -> Attack | None:
    """Return the attack on the most images, of those the one of the most effort; None where there is none."""
    return max(attacks, key=lambda a: (len(a.images), a.settings.effort), default=None)


def expected_alarms(record: Record, indices: Sequence[int], alpha: float, decisions: int) -> float:
    """Bound the expected number of images with a confirmed alarm in a record without faults.

    An alarm needs a false certificate, of which each has a chance of at most the run's alpha, or two wrong decisions on
    independent votes, each with a chance of at most ``alpha``. Images are counted, since one false certificate may be
    contradicted by every decision on its image.
    """
    wanted = set(indices)
    certified = sum(c.index in wanted and c.predicted is not None and c.n > 0 for c in record.counted)
    return record.identity.sampling.alpha * certified + alpha**2 * decisions
