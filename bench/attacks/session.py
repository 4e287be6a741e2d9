"""Attack the smoothed classifier of a finished run on its own images, and record what fresh votes decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.attacks import alarms
from bench.attacks.decide import Decided, Decider, Predict, smallest_n
from bench.attacks.perturb import Placed, place_float, place_grid, reach
from bench.attacks.pgd import Slope, Surroundings, by_gradient, by_votes, descend, margin
from bench.attacks.presets import PRESETS, RANDOM
from bench.errors import BenchError
from bench.globalstate import fixed_rng
from bench.io.files import digest
from bench.models.arithmetic import deterministic
from bench.records import attacks
from bench.records.attack_writer import AttackFile
from bench.records.attacks import AttackedImage, AttackSettings, By, Result
from bench.records.record import Record
from bench.runs import fitting
from bench.runs.rebuilding import finished, through_base
from bench.runs.redraw import Rebuilt
from bench.smoothing.noise import Noise

ORDER: tuple[By, ...] = ("clean", "pgd", "query", "step", "noise", "unbounded")  # the slots of a radius


def attackable(path: Path) -> Record:
    """Read the record of a finished run. Raises BenchError where nothing can be attacked, or it fails its audit."""
    record = finished(path, "attack")
    attacks.read(path)  # a damaged file is refused before anything is loaded
    return record


def settings_of(record: Record, preset: str, radii: list[float] | None, images: int | None) -> AttackSettings:
    """Make the settings of an attack. Raises BenchError for a value out of range.

    Args:
        record: The run.
        preset: One of ``PRESETS``.
        radii: Of the balls to search; None: those of the run's table.
        images: Number of images, spread over those of the run; None: the preset's, at most all.
    """
    budget, sampling, indices = PRESETS[preset], record.identity.sampling, record.identity.indices
    chosen = sorted({r for r in (record.info.radii if radii is None else radii) if r > 0})
    if not chosen:
        raise BenchError(f"{record.path}: its table has no radius above 0; give some with --radii")
    if images is not None and not 1 <= images <= len(indices):
        raise BenchError(f"--images {images}: the run has 1 to {len(indices)}")
    count = min(len(indices), budget.images or len(indices)) if images is None else images
    n = min(sampling.n, budget.n)
    if n < (least := smallest_n(sampling.alpha)):
        fix = "use --preset paper" if sampling.n >= least else f"attack a run of --n {least} or more"
        raise BenchError(f"{n} votes decide nothing at alpha {sampling.alpha:g}, which needs {least}; {fix}")
    return AttackSettings.of(
        {
            "version": attacks.VERSION,
            "run": record.identity.sha256,
            "certificates": record.info.certificates_sha256,
            "preset": preset,
            "radii": chosen,
            "checked": chosen[-1],
            "indices": [indices[i * len(indices) // count] for i in range(count)],
            "white_box": True,
            "steps": budget.steps,
            "draws": budget.draws,
            "restarts": budget.restarts,
            "query_steps": budget.query_steps,
            "query_pairs": budget.query_pairs,
            "n": n,
            "alpha": sampling.alpha,
        }
    )


def gradients_reach(attacker: Attacker) -> bool:
    """Return whether gradients of the logits reach the image; not those of a served base."""
    around = attacker.around(attacker.settings.indices[0], "pgd", 0.0)
    delta = torch.zeros_like(around.x).requires_grad_()
    with attacker.searching(), torch.enable_grad():
        out = around.log_probabilities(delta, keys := around.keys(1), around.normals(keys))
        return out.requires_grad and torch.autograd.grad(out.sum(), delta, allow_unused=True)[0] is not None


@dataclass(frozen=True)
class Attacker:
    """A rebuilt run and the settings of an attack on it."""

    record: Record
    rebuilt: Rebuilt
    settings: AttackSettings

    def seed(self, use: str) -> int:
        """Return the seed of one use of noise, which the settings decide."""
        return int(digest([self.settings.sha256, use])[:15], 16)

    def decider(self, use: str) -> Decider:
        """Make what draws the votes of decisions; another ``use`` draws other ones."""
        s = self.settings
        tau = self.rebuilt.run.identity.noise.tau
        return Decider(self.rebuilt, Predict(s.n, s.alpha, tau), self.seed(use))

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Compute gradients and answers of the defense, always the same on one kind of machine."""
        run = self.rebuilt.run
        errors = fitting.attribute_errors(run.plan.defense, "under attack")
        with errors, through_base(run.fitted.defense), fixed_rng(0), deterministic():
            yield

    def around(self, index: int, by: By, radius: float) -> Surroundings:
        """Return the classifier around a clean image, with noise for one attack and radius.

        Gradients are those of the defense in float32, also where its votes are computed in other arithmetic.
        """
        run = self.rebuilt.run
        x = torch.from_numpy(run.split.pixels([index])).to(run.task.device)
        label, noise = run.task.labels(index), Noise(self.seed("search"), "attack")
        purpose = f"{by}/{radius!r}"
        return Surroundings(run.fitted.defense, x, label, run.plan.sigma, noise, purpose, index, run.task.block)

    def place(self, index: int, delta: Tensor, radius: float) -> Placed:
        """Return the attacked image that the run's certificates speak of."""
        run, wanted = self.rebuilt.run, delta[0].detach().cpu().numpy()
        if run.plan.noise == "grid":
            return place_grid(run.split.integers([index])[0], wanted, radius, run.plan.card.levels)
        return place_float(run.split.pixels([index])[0], wanted, radius)

    def pixels(self, placed: Placed) -> Tensor:
        """Return an attacked image as pixels in [0, 1], [1, C, H, W]."""
        run = self.rebuilt.run
        scale = run.plan.card.levels - 1 if run.plan.noise == "grid" else 1
        pixels = placed.image.astype(np.float32) / np.float32(scale)
        return torch.from_numpy(pixels[None]).to(run.task.device)

    def attack(self, index: int) -> AttackedImage:
        """Attack one image at all radii. An attack that has succeeded is not repeated at larger ones."""
        label, counts = self.rebuilt.run.task.labels(index), [0, 0]
        clean = self.place(index, torch.zeros(1, *self.rebuilt.run.task.shape), 0.0)
        decided = self._decide(index, 0, 0.0, {"clean": clean})
        if decided[0].result.predicted in (None, label):  # else it is attacked without any perturbation
            found = set[By]()
            for place, radius in enumerate([*self.settings.radii, None], 1):
                tried = [by for by in self._tried(radius) if by not in found]
                now = self._decide(index, place, radius, {by: self.best(index, by, radius, counts) for by in tried})
                found |= {d.result.by for d in now if d.result.predicted not in (None, label)}
                decided += now
        return AttackedImage.of(
            {
                "attack": self.settings.name,
                "index": index,
                "label": label,
                "results": [d.result.as_json() for d in decided],
                "gradients": counts[0],
                "zero": counts[1],
                "alarms": [a.as_json() for a in alarms.find(self, index, decided)],
            }
        )

    def _decide(self, index: int, place: int, radius: float | None, placed: dict[By, Placed]) -> list[Decided]:
        """Decide the images of one radius, which is the ``place``-th."""
        slots = {place * len(ORDER) + ORDER.index(by): by for by in placed}
        if not slots:
            return []
        found = self.decider("decide").decide(index, {slot: placed[by].image for slot, by in slots.items()})
        return [
            Decided(
                slot,
                placed[by].image,
                Result.of(
                    {
                        "by": by,
                        "radius": radius,
                        "distance": placed[by].distance,
                        "predicted": found[slot].predicted,
                        "top_count": found[slot].top_count,
                        "runner_up_count": found[slot].runner_up_count,
                    }
                ),
            )
            for slot, by in slots.items()
        ]

    def _tried(self, radius: float | None) -> tuple[By, ...]:
        """Return the attacks at a radius; those that only detect masked gradients run at one."""
        main: tuple[By, ...] = ("pgd", "query") if self.settings.white_box else ("query",)
        if radius is None:
            return ("unbounded",)
        if radius != self.settings.checked:
            return main
        return (*main, "step", "noise") if self.settings.white_box else (*main, "noise")

    def best(self, index: int, by: By, radius: float | None, counts: list[int]) -> Placed:
        """Return the best image that an attack finds; adds its gradients, and the zero ones, to ``counts``."""
        with self.searching():
            around = self.around(index, by, radius or 0.0)
            length = reach(around.x) if radius is None else radius
            made = [self.place(index, delta, length) for delta in self._perturbations(around, by, length)]
            counts[0] += around.gradients
            counts[1] += around.zero
            if len(made) == 1:
                return made[0]
            keys = around.keys(self.settings.draws)
            return min(made, key=lambda placed: margin(around, self.pixels(placed) - around.x, keys))

    def _perturbations(self, around: Surroundings, by: By, radius: float) -> Iterator[Tensor]:
        s = self.settings
        if by == "noise":
            for _ in range(RANDOM):
                yield radius * around.random()
            return
        queried = by == "query" or not s.white_box
        slope: Slope = by_votes(around, s.query_pairs) if queried else by_gradient(around, s.draws)
        if by == "step":
            yield descend(around, slope, radius, 1)
            return
        for restart in range(1 if queried or by == "unbounded" else s.restarts):
            yield descend(around, slope, radius, s.query_steps if queried else s.steps, from_random=restart > 0)


def prepare(record: Record, rebuilt: Rebuilt, settings: AttackSettings) -> Attacker:
    """Return the attacker, without a white-box attack where no gradients reach the image."""
    attacker = Attacker(record, rebuilt, settings)
    if gradients_reach(attacker):
        return attacker
    return Attacker(record, rebuilt, settings.replace(white_box=False))


def run(attacker: Attacker, file: AttackFile, progress: Callable[[int, int], None]) -> None:
    """Attack the images that are left; ``progress`` is called with (images done, images attacked)."""
    done, largest = file.attack, max(attacker.settings.radii)

    def so_far() -> None:
        progress(len(done.images), done.count("attacked", largest))

    so_far()
    for index in file.left:
        file.append(attacker.attack(index))
        so_far()


def largest_cost(settings: AttackSettings) -> tuple[int, int, int]:
    """Return the most forward passes, backward passes and votes that one image may take."""
    s, radii = settings, len(settings.radii)
    query = 2 * s.query_steps * s.query_pairs
    judged = RANDOM * s.draws
    if not s.white_box:
        return (radii + 1) * query + judged, 0, (radii + 3) * s.n
    once = s.steps * s.draws
    pgd = s.restarts * once
    judge = s.restarts * s.draws if s.restarts > 1 else 0
    backward = radii * pgd + s.draws + once
    return backward + radii * (judge + query) + judged, backward, (2 * radii + 4) * s.n
