"""Run folders made up for tests: radii and predictions as given, all else as a finished run has it."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench.io.files import file_sha256
from bench.records import metrics, schema
from bench.records.schema import Cost, Identity, RunInfo
from bench.records.stored import parse_json
from bench.records.writer import RunFolder
from bench.smoothing.anytime import Anytime
from bench.smoothing.fixed import Fixed
from bench.smoothing.votes import Certificate

RADII = [0.0, 0.25, 0.5, 0.75]


def begun(count: int, name: str = "lora", **changes: Any) -> RunInfo:
    """Return run.json of a run of ``name`` on ``count`` images of 8x8 before its first vote; ``changes``: identity."""
    identity: dict[str, Any] = {
        "dataset": "digits",
        "card": "c" * 64,
        "split": "test",
        "indices": list(range(count)),
        "images": "1" * 64,
        "base": {"name": "vit", "sha256": "b" * 64},
        "defense": {
            **{"name": name, "source": "d" * 64, "config": {"rank": 4}, "weights": "e" * 64, "parts": {}},
            "objective": "gaussian",
        },
        "train_sigma": 0.25,
        "sigma": 0.25,
        "noise": {"kind": "grid", "version": 1, "tau": 0.0},
        "procedure": {"kind": "fixed", "n0": 100, "n": 1000, "alpha": 0.001, "target": "selected"},
        "bound": "clopper-pearson",
        "seed": 0,
        "block": [256, 1, 8, 8],
        "dtype": "float32",
        "device": "cpu",
    }
    about = {
        **{"environment": {}, "arguments": {}, "radii": RADII, "preset": "quick", "classes": list("0123456789")},
        **{"data": {}, "base": {"clean_correct": 9, "images": 10}},
        "defense": {
            **{"family": "PEFT", "trains": "classifier-tuned", "paper": "", "access": "WEIGHTS"},
            **{"trained_elsewhere": [], "settings": {}, "search": [], "weights_file": None},
        },
    }
    return schema.started(Identity.of(parse_json(json.dumps(identity | changes))), about)


def costs(votes: int) -> dict[str, Any]:
    """Return the cost of a finished run."""
    keys = ("base_forwards", "queries", "trainable_nominal", "trainable_updated", "trained_elsewhere", "parameters")
    return {
        **dict.fromkeys(keys, 1),
        **{"train_seconds": 10.0, "certify_seconds": 20.0, "votes": votes},
        **{"trained_here": 100, "flops_per_vote": 1e6, "peak_memory": 10**8},
    }


def made_up(
    out: Path,
    radii: Sequence[float | None],
    wrong: Sequence[int] = (),
    name: str = "lora",
    cost: dict[str, Any] | None = None,
    counted: bool = False,
    **changes: Any,
) -> Path:
    """Write a finished run; image i is certified at ``radii[i]`` (None: abstained), right except those ``wrong``.

    A radius is that of the fewest votes that certify it, so at least ``radii[i]``. ``counted``: ``radii`` are instead
    the number of the procedure's votes for the class. ``changes`` are of the identity, which is otherwise that of a
    run of ``name`` on 8x8 images.
    """
    info = begun(len(radii), name, **changes)
    run = RunFolder(out, f"digits-{name}-s{info.identity.sigma:g}", info)
    for i, (index, radius) in enumerate(zip(info.identity.indices, radii, strict=True)):
        votes = int(radius or 0) if counted else fewest(info.identity, radius)
        run.append(certificate(info.identity, index, i % 10, votes, i in wrong))
    run.finish(Cost.of(costs(sum(c.votes for c in run.done)) | (cost or {})), metrics.summarise(run.done, RADII))
    run.close()
    return run.path


def seal(run: Path) -> Path:
    """Make run.json's hash that of certificates which a test has edited."""
    info = json.loads((run / "run.json").read_text())
    info["certificates_sha256"] = file_sha256(run / "certificates.jsonl")
    (run / "run.json").write_text(json.dumps(info))
    return run


def fewest(identity: Identity, radius: float | None) -> int:
    """Return the fewest of the procedure's votes that certify a radius; half of them, which abstain, for None."""
    return _fewest(identity.procedure, identity.sigma, identity.noise.tau, radius)


@cache
def _fewest(made: Fixed | Anytime, sigma: float, tau: float, radius: float | None) -> int:
    if radius is None:
        return made.n // 2

    def enough(votes: int) -> bool:
        p_lower, certified = made.recompute(sigma, made.n, votes, tau)
        return p_lower > 0.5 and certified >= radius

    votes = bisect_left(range(made.n + 1), True, key=enough)
    if votes > made.n:
        raise ValueError(f"no {made.n} votes certify {radius} at sigma {sigma}")
    return votes


def certificate(identity: Identity, index: int, label: int, top: int, wrong: bool = False) -> Certificate:
    """Return the certificate of an image with ``top`` of the procedure's votes."""
    procedure = identity.procedure
    n0, n = procedure.selection_votes, procedure.n
    if wrong and procedure.target == "correct":
        return Certificate((label + 1) % 10, 0.0, n0, 0, 0, None, 0, 0.0, n0, index, label, 0.5)
    p_lower, radius = procedure.recompute(identity.sigma, n, top, identity.noise.tau)
    predicted = None if p_lower <= 0.5 else (label + 1) % 10 if wrong else label
    second = None if top == n else 9
    return Certificate(predicted, radius, n0, n, top, second, n - top, p_lower, n0 + n, index, label, 0.5)


def edit(run: Path, **changes: Any) -> Path:
    """Change fields of the record's second certificate."""
    lines = [json.loads(line) for line in (run / "certificates.jsonl").read_text().splitlines()]
    lines[1] |= changes
    (run / "certificates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run
