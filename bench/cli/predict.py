"""The command ``bench predict``: pictures through a run's smoothed classifier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bench.cli.options import print_table, with_options
from bench.errors import shown
from bench.options import option
from bench.text import DASH

if TYPE_CHECKING:
    from bench.runs.prediction import Prediction, SmoothedModel

app = typer.Typer(rich_markup_mode=None)


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What ``bench predict`` takes."""

    run: Path = option("A run folder.", positional=True)  # noqa: RUF009 - it makes a field
    pictures: tuple[str, ...] = option("Pictures, or folders of pictures.", positional=True)
    n: int | None = option(
        "Votes that bound the probability, per picture. Default of this and the next two: the run's.", None
    )
    n0: int | None = option("Votes that select the class, per picture.", None)
    alpha: float | None = option("Failure probability of each certificate.", None)
    radius: float | None = option("Also say whether each prediction is certified at this l2 radius.", None)
    fit: str | None = option(
        "How to fit pictures that are not on the card's shape and grid, which are refused otherwise. resize-crop: the "
        "shorter side scaled, the centre cropped; levels: values rounded to the card's levels (resize-crop does too).",
        None,
    )
    seed: int | None = option(
        "Seed of the noise, to repeat a prediction. Default: a new random one, which is printed.", None
    )
    defense: str | None = option(
        "./file.py of the record's defense. A file is executed only if it is named here.", None
    )
    base: str | None = option("Address of the record's served base. It is contacted only if it is named here.", None)
    device: str | None = option("auto, cpu, cuda or mps. Default: the run's.", None)
    as_json: bool = option("Print JSON to stdout.", False, flag="--json")


@app.command()
@with_options(PredictOptions)
def predict(options: PredictOptions) -> None:
    """Predict pictures with a run's smoothed classifier: class and certified radius, or abstention."""
    from bench.data.given import check_fit, picture_files
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device
    from bench.runs.prediction import Sampling, open_model
    from bench.runs.rebuilding import finished
    from bench.runs.session import Session

    check_fit(options.fit)
    files = picture_files([Path(picture) for picture in options.pictures])
    record, reporter = finished(options.run, "predict with"), ConsoleReporter()
    session = Session(pick_device(options.device or record.identity.device or "auto"), options.run.parent, reporter)
    sampling = Sampling(options.n0, options.n, options.alpha, options.radius)
    model = open_model(record, session, sampling, options.defense, options.base)
    with reporter.predicting(f"{len(files)} pictures", len(files)) as progress:
        found = model.predict(files, fit=options.fit, seed=options.seed, progress=progress)
    if options.as_json:
        print(json.dumps(_as_json(model, found, options.radius), indent=1))
        return
    print_table([_row(one, options.radius) for one in found], "")
    for line in _remarks(model, found):
        print(shown(line))


def _row(one: Prediction, radius: float | None) -> dict[str, object]:
    from bench.smoothing.bounds import printed_radius  # it imports scipy

    row: dict[str, object] = {"picture": one.picture, "class": "abstains" if one.name is None else one.name}
    row["certified radius"] = DASH if one.predicted is None else printed_radius(one.radius)
    if radius is not None:
        row[f"holds at {radius:g}"] = "yes" if one.holds(radius) else "no"
    return row


def _remarks(model: SmoothedModel, found: Sequence[Prediction]) -> list[str]:
    """Say what the numbers mean, and what was changed in the pictures."""
    p = model.procedure
    lines = [
        f"l2 radii between images with pixels in [0, 1]; sigma {model.sigma:g}, n0 {p.n0}, n {p.n}; each certificate "
        f"fails with a chance of at most {p.alpha:g} over the noise, whose seed was {found[0].seed}"
    ]
    for one in found:
        lines += [f"{one.picture}: {change}" for change in one.changes]
        lines += [f"{one.picture}: {change}; the radius holds for the fitted picture" for change in one.fitted]
    return lines


def _as_json(model: SmoothedModel, found: Sequence[Prediction], radius: float | None) -> dict[str, object]:
    from bench.smoothing.procedures import describe

    rows = [asdict(one) for one in found]
    for row, one in zip(rows, found, strict=True):
        row.pop("seed")
        if radius is not None:
            row["holds"] = one.holds(radius)
    return {
        "run": str(model.record.path),
        "seed": found[0].seed,
        "sigma": model.sigma,
        "noise": model.record.identity.noise.kind,
        "procedure": describe(model.procedure),
        "asked_radius": radius,
        "pictures": rows,
    }
