"""Released per-image logs made into run folders, which keep a copy of the log."""

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
from bench.records import metrics
from bench.records.flaws import CHOICES, Stated
from bench.records.logs import read_log, statements
from bench.records.record import ELSEWHERE, Claim, Record, Run, read_run

SOURCE = "source.tsv"  # the log, in the run folder
LARGEST = 64 * 2**20  # bytes read: a million images
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)  # the table's, where no card says which


def import_log(log: Path, stated: Stated, out: Path) -> Record:
    """The log's run folder below ``out``, made now unless it is there. Raises BenchError where it cannot be read."""
    data = _read(log)
    stated = _filled(stated, data)
    card = _card(stated.dataset)
    dataset = card.name if card else stated.dataset
    radii = [stated.radius] if stated.radius else list(card.radii if card else RADII)
    classes = list(card.classes) if card else []
    try:
        claims, flags = read_log(data, stated, radii, len(classes))
    except BenchError as e:
        raise BenchError(f"{log}: {e}") from None
    # A stranger's file name becomes the name of a folder and a row of tables.
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", log.stem).strip("-.")[:60] or "log"
    procedure = {"kind": "fixed" if stated.format == "cohen" else "adaptive", "n0": stated.n0, "n": stated.n}
    sha256 = hashlib.sha256(data).hexdigest()
    identity: dict[str, Any] = {
        "dataset": dataset,
        "card": None,
        "split": stated.split,
        "indices": [c.index for c in claims],
        "images": None,
        "base": None,
        "defense": {"name": name, "source": sha256, "config": {}, "weights": None, "parts": {}, "objective": None},
        "train_sigma": None,
        "sigma": stated.sigma,
        "noise": {"kind": stated.noise, "version": None, "tau": 0.0},
        "procedure": procedure
        | {"alpha": stated.alpha, "target": stated.target}
        | ({"radii": radii} if stated.radius else {}),
        "bound": "clopper-pearson",
        "seed": None,
        "imported": {"format": stated.format, "sha256": sha256},
    }
    extra: dict[str, Any] = {
        "environment": {},
        "arguments": {"log": log.name, "dataset": stated.dataset},
        "radii": radii,
        "preset": None,
        "classes": classes,
        "data": {},
        "base": None,
        "defense": {
            "family": "imported",
            "trains": "imported",
            "paper": "",
            "access": None,
            "trained_elsewhere": [],
            "settings": {},
            "search": [],
            "weights_file": None,
        },
        "flags": flags,
    }
    run = Run(out, f"{dataset}-{name}-s{stated.sigma:g}", identity, extra)
    try:
        if run.info["status"] != "complete":
            with writing(run.path, ELSEWHERE), replacing(run.path / SOURCE) as partial:
                partial.write_bytes(data)
            run.write(claims)
            run.finish(_cost(claims), metrics.summarise(claims, radii))
    finally:
        run.close()
    return read_run(run.path)


def stated_by(log: Path, dataset: str, **given: Any) -> Stated:
    """What decides the log's certificates: what is ``given``, else what the log states. Raises BenchError."""
    said = statements(_read(log)) | {k: v for k, v in given.items() if v is not None}
    if lacking := [k for k in ("sigma", "alpha", "n") if k not in said]:
        raise BenchError(f"{log} does not state {', '.join(lacking)}: give {' '.join(f'--{k}' for k in lacking)}")
    return Stated(**{"format": "cohen", "dataset": dataset, **said})


def _filled(stated: Stated, data: bytes) -> Stated:
    """The same with what it leaves open as the log states it, or by default."""
    said = {k: words[0] for k, words in CHOICES.items()} | statements(data)
    left: dict[str, Any] = {k: said.get(k) for k in ("n0", *CHOICES) if getattr(stated, k) is None}
    return replace(stated, **left)


def read_again(record: Record) -> tuple[list[Claim], list[str]]:
    """What the log in an imported run's folder gives: claims and flags. Raises BenchError where it cannot be read."""
    procedure = record.identity["procedure"]
    (radius,) = procedure.get("radii", [None])
    numbers = (record.identity["sigma"], procedure["alpha"], procedure["n"], procedure["n0"], radius)
    words = (record.identity["noise"]["kind"], procedure.get("target", "selected"), record.identity["split"])
    stated = Stated(record.identity["imported"]["format"], record.identity["dataset"], *numbers, *words)
    return read_log(_read(record.path / SOURCE), stated, record.info["radii"], len(record.info["classes"]))


def _read(log: Path) -> bytes:
    try:
        return limits.contents(log, LARGEST, "more than a log of a million images; import a part of it")
    except OSError as e:
        raise BenchError(f"cannot read {log}: {e.strerror}") from None


def _card(dataset: str) -> Card | None:
    if dataset in card_files() or dataset.endswith(".toml"):
        return load_card(dataset)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", dataset):
        raise BenchError(f"--dataset {dataset!r}: letters, digits and _ . - make a name")
    return None


def _cost(claims: Sequence[Claim]) -> dict[str, Any]:
    unknown = "train_seconds base_forwards queries trainable_nominal trainable_updated trained_here trained_elsewhere "
    unknown += "parameters flops_per_vote peak_memory"
    return dict.fromkeys(unknown.split()) | {
        "certify_seconds": metrics.total(c.seconds for c in claims),
        "votes": metrics.total(c.votes for c in claims),
    }
