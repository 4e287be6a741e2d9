"""Commands of published results: publish and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.options import AsJson
from bench.errors import BenchError, note, shown

if TYPE_CHECKING:  # imports torch
    from bench.publishing.checking import Verified

app = typer.Typer(rich_markup_mode=None)
Defense = Annotated[
    str | None, typer.Option(help="./file.py of the record's defense. A file is executed only if it is named here.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


@app.command()
def publish(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, folders of runs, or studies.")],
    to: Annotated[
        str, typer.Option(help="hub:OWNER/NAME, a model repository, with the token in $HF_TOKEN; or a folder.")
    ],
    weights: Annotated[
        bool, typer.Option("--weights", help="Also the trained weights, so that others can certify images again.")
    ] = False,
    defense: Defense = None,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent, then exit; needs no token.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish finished runs with their study and a model card. Repeat the command to resume; it sends what is new."""
    from bench.publishing.contents import gather
    from bench.publishing.sending import publish as send

    gathered = gather(runs)
    entries: list[Path] = []
    if weights:
        from bench.publishing.weights import entries_of

        entries = entries_of(gathered.records, device, defense)
    elif defense is not None:
        raise BenchError("--defense is for --weights: without it, nothing is rebuilt")
    sent = send(gathered, entries, to, dry_run)
    for line in sent.notes:
        note(line)
    if as_json:
        found = [{"path": path, "bytes": size, "new": new} for path, (size, new) in sent.files.items()]
        print(json.dumps({"place": sent.place, "revision": sent.revision, "files": found}, indent=1))
        return
    for path, (size, new) in sent.files.items():
        print(shown(f"{'add    ' if new else 'replace'} {path}, {size:,} bytes"))
    at = f"{sent.place}@{sent.revision}" if sent.revision else sent.place
    total = f"{len(sent.files)} files, {sum(size for size, _ in sent.files.values()):,} bytes"
    if not sent.files:
        print(shown(f"nothing to send: {at} has all of it"))
    elif dry_run:
        print(shown(f"would publish to {at}: {total}"))
    else:
        print(shown(f"published {at}: {total}"))


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="A run folder, a folder of runs, or hub:OWNER/NAME.")],
    deep: Annotated[bool, typer.Option("--deep", help="Certify every image again; retrain if needed.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Also test the certificates on noise of a new random seed.")
    ] = False,
    defense: Defense = None,
    base: Annotated[
        str | None, typer.Option(help="Address of the record's served base. It is contacted only if it is named here.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Audit records: recompute radii, check images and hashes, redraw a sample of votes. Exit 1: a check failed.

    The last line of a run says "verified" where no check failed and images were certified again. Exit 2: a run could
    not be read or rebuilt; the others of its folder are checked all the same.
    """
    from bench.publishing.reading import locate

    place = locate(run, weights=True)
    from bench.cli import github
    from bench.process.environment import describe, pick_device
    from bench.publishing.checking import Check, verify

    on, found = pick_device(device), []
    for one in verify(place, on, Check(deep, fresh, defense, base)):
        found.append(one)
        if not as_json:
            _print(one)
    here = describe(on)
    if as_json:
        print(json.dumps([one.as_json(here) for one in found], indent=1))
    github.publish(_summary(found), _annotations(found))
    if any(f.problem for one in found for f in one.findings):
        raise typer.Exit(1)
    if unchecked := [one for one in found if one.error]:
        first = f"{unchecked[0].name}: {unchecked[0].error}"
        raise BenchError(f"{len(unchecked)} of {len(found)} runs were not checked to the end; {first}")


def _print(one: Verified) -> None:
    """Print each check on its line, a problem below it, and the verdict."""
    for f in one.findings:
        print(shown(f"FAIL: {f.check}" if f.problem else f"ok:   {f.check}"))
        if f.problem:
            print(shown(f"      {f.problem}"))
    at = f" of {one.place}" if one.place.source else ""
    print(shown(f"{one.name}{at}: {one.verdict}{', with the published weights' if one.weights else ''}"), flush=True)


def _summary(found: list[Verified]) -> str:
    """Return a table of markdown for the summary of a step of GitHub Actions."""
    from bench.text import escape

    lines = ["| run | verdict |", "| --- | --- |"]
    lines += [f"| {escape(one.name)} | {escape(str(one.verdict))} |" for one in found]
    return "\n".join(lines) + "\n\n"


def _annotations(found: list[Verified]) -> list[tuple[str, str, str]]:
    """Return an error for each run that failed, and a warning for each whose images could not be certified again."""
    from bench.records.findings import FAILED, VERIFIED

    levels = [("error" if one.verdict.verdict == FAILED else "warning", one) for one in found]
    return [(level, one.name, str(one.verdict)) for level, one in levels if one.verdict.verdict != VERIFIED]
