"""The command ``bench attack``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bench.cli.options import with_options
from bench.errors import BenchError, Interrupted, shown, unknown
from bench.options import option

if TYPE_CHECKING:  # these import torch
    from bench.attacks.session import Attacker
    from bench.process.console import ConsoleReporter
    from bench.records.attacks import Attack, AttackSettings
    from bench.records.record import Record

app = typer.Typer(rich_markup_mode=None)


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """What ``bench attack`` takes."""

    runs: tuple[str, ...] = option("One or more folders of finished runs.", positional=True)
    radii: str | None = option("l2 radii of the attacks, with commas. Default: those of the run's table.", None)
    preset: str | None = option("The budget: quick, standard or paper. Default: the run's preset.", None)
    images: int | None = option("Number of images, spread over those of the run. Default: the preset's.", None)
    dry_run: bool = option("Estimate passes, votes and time, then exit.", False)
    defense: str | None = option(
        "./file.py of the record's defense. A file is executed only if it is named here.", None
    )
    base: str | None = option("Address of the record's served base. It is contacted only if it is named here.", None)
    device: str = option("auto, cpu, cuda or mps.", "auto")
    as_json: bool = option("Print JSON to stdout.", False, flag="--json")


@app.command()
@with_options(AttackOptions)
def attack(options: AttackOptions) -> None:
    """Attack the smoothed classifier of finished runs; repeat the command to resume. Exit 1: a certificate is false."""
    from bench.attacks.presets import PRESETS
    from bench.attacks.session import attackable, prepare
    from bench.process.console import ConsoleReporter
    from bench.process.environment import pick_device
    from bench.runs.rebuilding import rebuild_checked
    from bench.runs.session import Session

    if options.preset is not None and options.preset not in PRESETS:
        raise unknown("preset", options.preset, PRESETS)
    _radii(options.radii)
    records = [attackable(Path(run)) for run in options.runs]
    chosen = [(record, _settings(record, options)) for record in records]  # all refused before one is attacked
    done: list[tuple[Record, Attack]] = []
    plans: list[dict[str, Any]] = []
    try:
        for record, settings in chosen:
            reporter = ConsoleReporter()
            session = Session(pick_device(options.device), record.path.parent, reporter)
            attacker = prepare(record, rebuild_checked(record, session, *_named(record, options)), settings)
            plans.append(_announce(attacker, reporter))
            if not options.dry_run:
                done.append((record, _attacked(attacker, reporter)))
    except KeyboardInterrupt:  # caught here, since typer would turn it into a silent exit
        raise Interrupted("interrupted; all attacked images are kept: repeat the command to resume") from None
    if options.dry_run:
        if options.as_json:
            print(json.dumps(plans, indent=1))
        return
    if options.as_json:
        print(json.dumps([_summary(record, attack) for record, attack in done], indent=1))
    else:
        for record, one in done:
            _print(record, one)
    confirmed = [_sound_the_alarm(record, one) for record, one in done]
    if any(confirmed):
        raise typer.Exit(1)


def _radii(text: str | None) -> list[float] | None:
    """Parse ``--radii``. Raises BenchError where a value is no radius."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < r < 1e6 for r in found):
        raise BenchError(f"--radii {text}: give radii above 0 with commas, such as .25,.5")
    return found


def _settings(record: Record, options: AttackOptions) -> AttackSettings:
    """Make the settings of a run's attack. Raises BenchError where it cannot be attacked with these options."""
    from bench.attacks.presets import PRESETS
    from bench.attacks.session import settings_of
    from bench.runs.redraw import not_named

    if why := not_named(record.info.arguments, *_named(record, options)):
        raise BenchError(f"{record.path}: {why}")
    preset = options.preset or (record.info.preset if record.info.preset in PRESETS else "quick")
    return settings_of(record, preset, _radii(options.radii), options.images)


def _named(record: Record, options: AttackOptions) -> tuple[str | None, str | None]:
    """Return the named file and server, each where the run has one: of several runs, only some may."""
    from bench.models.served import is_url

    arguments = record.info.arguments
    has_file, served = str(arguments.get("defenses")).endswith(".py"), is_url(str(arguments.get("base")))
    return options.defense if has_file else None, options.base if served else None


def _announce(attacker: Attacker, reporter: ConsoleReporter) -> dict[str, Any]:
    """Print what the attack may cost; return the same as JSON."""
    from bench.attacks.budget import estimate
    from bench.process.console import duration

    settings, cost = attacker.settings, estimate(attacker)
    radii = ", ".join(f"{r:g}" for r in settings.radii)
    reporter.say(
        f"{attacker.record.path.name}: attack {settings.name}, preset {settings.preset}: {settings.budget}; "
        f"{len(settings.indices)} images at r = {radii}"
    )
    reporter.say(
        f"at most {cost.forwards:,} forward and {cost.backwards:,} backward passes to search and {cost.votes:,} votes "
        f"to decide, about {duration(cost.seconds)} at most"
    )
    return {"run": str(attacker.record.path), "settings": settings.as_json(), **vars(cost)}


def _attacked(attacker: Attacker, reporter: ConsoleReporter) -> Attack:
    from bench.attacks.session import run
    from bench.process.environment import describe
    from bench.records.attack_writer import AttackFile
    from bench.records.schema import Environment

    here = Environment.of(describe(attacker.rebuilt.run.task.device))
    file = AttackFile(attacker.record.path, attacker.settings, here)
    try:
        if not file.left:
            reporter.say(f"{attacker.record.path}: attack {attacker.settings.name} is already complete")
        else:
            name, total = attacker.record.identity.defense.name, len(attacker.settings.indices)
            with reporter.attacking(name, total) as update:
                run(attacker, file, update)
        return file.attack
    finally:
        file.close()


def _summary(record: Record, attack: Attack) -> dict[str, Any]:
    from bench.records.masking import checks
    from bench.report.attacked import numbers

    return {
        "run": str(record.path),
        "settings": attack.settings.as_json(),
        "accuracy": numbers(record, attack),
        "checks": [vars(check) for check in checks(attack)],
        "alarms": [{"index": image.index, **alarm.as_json()} for image, alarm in attack.alarms],
        "expected_alarms": _expected(record, attack),
    }


def _print(record: Record, attack: Attack) -> None:
    from bench.records.masking import checks
    from bench.report.attacked import text

    print(text(record, attack))
    for check in checks(attack):
        print(f"{check.status + ':':<13}{check.text}")
    print()


def _expected(record: Record, attack: Attack) -> float:
    from bench.records.attacks import expected_alarms

    decisions = sum(len(image.results) for image in attack.images)
    indices = [image.index for image in attack.images]
    return expected_alarms(record, indices, attack.settings.alpha, decisions)


def _sound_the_alarm(record: Record, attack: Attack) -> bool:
    """Print every contradiction of a certificate; return whether a second decision confirms one."""
    found = attack.alarms
    if not found:
        return False
    confirmed = sum(alarm.confirmed for _, alarm in found)
    lines = [f"ALARM: {record.path}: {len(found)} decisions inside certified radii contradict their certificates"]
    for image, alarm in found:
        second = "abstains" if alarm.redrawn is None else f"says class {alarm.redrawn}"
        lines.append(
            f"  image {image.index}: certified as class {alarm.certified} up to r = {alarm.radius:.4g}; class "
            f"{alarm.predicted} at distance {alarm.distance:.4g} ({alarm.by}); a second decision {second}; "
            f"saved as {', '.join(f for f in alarm.files if f.endswith('.npy'))}"
        )
    images = len({image.index for image, alarm in found if alarm.confirmed})
    lines.append(
        f"  confirmed by a second decision: {confirmed}, on {images} {'image' if images == 1 else 'images'}; chance "
        f"gives a record without faults at most {_expected(record, attack):.2g} such images in expectation"
    )
    if record.identity.noise.kind == "float":
        lines.append(
            "  the run's noise is float: in floating point x + noise is no translated Gaussian, so a certificate may "
            "fail by rounding alone (docs/certification.md); --noise grid excludes this"
        )
    lines.append(f"  check the record: bench verify {record.path} --deep --fresh")
    for line in lines:
        print(shown(line), file=sys.stderr)
    return confirmed > 0
