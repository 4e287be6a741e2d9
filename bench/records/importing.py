"""Import released per-image logs into run folders, which keep a copy of the log."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.data.card import Card
from bench.data.datasets import card_files, load_card
from bench.errors import BenchError
from bench.io import limits
from bench.io.files import replacing, writing
from bench.records import metrics, schema
from bench.records.flaws import CHOICES, LogParameters
from bench.records.logs import Log, read_log, stated_in
from bench.records.record import ImportedCertificate, Record, read_run
from bench.records.schema import Cost, Identity, RunInfo
from bench.records.writer import ELSEWHERE, RunFolder

SOURCE = "source.tsv"  # the log, in the run folder
LARGEST = 64 * 2**20  # bytes read: a million images
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the table, where no card states them


def import_log(log: Path, parameters: LogParameters, out: Path) -> Record:
    """Create the log's run folder below ``out``, unless it exists. Raises BenchError where it cannot be read."""
    data = _read(log)
    parameters = _completed(parameters, data)
    card = _card(parameters.dataset)
    dataset = card.name if card else parameters.dataset
    radii = [parameters.radius] if parameters.radius else list(card.radii if card else RADII)
    classes = list(card.classes) if card else []
    try:
        found = read_log(data, parameters, radii, len(classes))
    except BenchError as e:
        raise BenchError(f"{log}: {e}") from None
    # A file name is untrusted input, and becomes the name of a folder and of a row in tables.
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", log.stem).strip("-.")[:60] or "log"
    identity = _identity(name, dataset, parameters, hashlib.sha256(data).hexdigest(), found)
    arguments = {"log": log.name, "dataset": parameters.dataset}
    run = RunFolder(out, f"{dataset}-{name}-s{parameters.sigma:g}", _info(identity, arguments, radii, classes, found))
    try:
        if not run.info.complete:
            with writing(run.path, ELSEWHERE), replacing(run.path / SOURCE) as partial:
                partial.write_bytes(data)
            run.write(found.certificates)
            run.finish(_cost(found.certificates), metrics.summarise(found.certificates, radii))
    finally:
        run.close()
    return read_run(run.path)


def _identity(name: str, dataset: str, parameters: LogParameters, sha256: str, log: Log) -> Identity:
    return Identity.of(
        {
            "dataset": dataset,
            "card": None,
            "split": parameters.split,
            "indices": [c.index for c in log.certificates],
            "images": None,
            "base": None,
            "defense": {"name": name, "source": sha256, "config": {}, "weights": None, "parts": {}, "objective": None},
            "train_sigma": None,
            "sigma": parameters.sigma,
            "noise": {"kind": parameters.noise, "version": None, "tau": 0.0},
            "procedure": {
                "kind": "fixed" if parameters.format == "cohen" else "adaptive",
                **{"n0": parameters.n0, "n": parameters.n, "alpha": parameters.alpha, "target": parameters.target},
                **({"radii": [parameters.radius]} if parameters.radius else {}),
            },
            "bound": "clopper-pearson",
            "seed": None,
            "imported": {"format": parameters.format, "sha256": sha256},
        }
    )


def _info(
    identity: Identity, arguments: dict[str, str], radii: Sequence[float], classes: Sequence[str], log: Log
) -> RunInfo:
    defense: dict[str, Any] = {"family": "imported", "trains": "imported", "paper": "", "access": None}
    return schema.started(
        identity,
        {
            "environment": {},
            "arguments": arguments,
            "radii": radii,
            "preset": None,
            "classes": classes,
            "data": {},
            "base": None,
            "defense": defense | {"trained_elsewhere": [], "settings": {}, "search": [], "weights_file": None},
            "flags": log.flags,
        },
    )


def parameters_of(log: Path, dataset: str, **given: Any) -> LogParameters:
    """Return what decides the log's certificates: what is ``given``, else what the log states. Raises BenchError."""
    known = stated_in(_read(log)) | {k: v for k, v in given.items() if v is not None}
    if lacking := [k for k in ("sigma", "alpha", "n") if k not in known]:
        raise BenchError(f"{log} does not state {', '.join(lacking)}: give {' '.join(f'--{k}' for k in lacking)}")
    return LogParameters(**{"format": "cohen", "dataset": dataset, **known})


def _completed(parameters: LogParameters, data: bytes) -> LogParameters:
    """Fill what is left open with what the log states, else with the default."""
    known = {k: words[0] for k, words in CHOICES.items()} | stated_in(data)
    left: dict[str, Any] = {k: known.get(k) for k in ("n0", *CHOICES) if getattr(parameters, k) is None}
    return replace(parameters, **left)


def read_again(record: Record) -> Log:
    """Read the log in an imported run's folder once more. Raises BenchError where it cannot be read."""
    identity, sampling = record.identity, record.identity.sampling
    assert identity.imported is not None
    parameters = LogParameters(
        format=identity.imported.format,
        dataset=identity.dataset,
        sigma=identity.sigma,
        alpha=sampling.alpha,
        n=sampling.n,
        n0=sampling.n0,
        radius=sampling.radii[0] if sampling.radii else None,
        noise=identity.noise.kind,
        target=sampling.target,
        split=identity.split,
    )
    return read_log(_read(record.path / SOURCE), parameters, record.info.radii, len(record.info.classes))


def _read(log: Path) -> bytes:
    try:
        return limits.contents(log, LARGEST, "more than a log of a million images; import a part of it")
    except OSError as e:
        raise BenchError(f"cannot read {log}: {e.strerror}") from None


def _card(dataset: str) -> Card | None:
    if dataset in card_files() or dataset.endswith(".toml"):
        return load_card(dataset)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", dataset):
        raise BenchError(f"--dataset {dataset!r}: a name has letters, digits and _ . - only")
    return None


def _cost(certificates: Sequence[ImportedCertificate]) -> Cost:
    unknown = "train_seconds base_forwards queries trainable_nominal trainable_updated trained_here trained_elsewhere "
    unknown += "parameters flops_per_vote peak_memory"
    return Cost.of(
        dict.fromkeys(unknown.split())
        | {
            "certify_seconds": metrics.total(c.seconds for c in certificates),
            "votes": metrics.total(c.votes for c in certificates),
        }
    )
