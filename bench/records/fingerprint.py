"""Fingerprints of the function that a run certifies: certificates of another function are refused.

A fingerprint is the hash of the logits of one block of votes that decide nothing, always the same ones of the run's
first image. Another kind of machine changes the last bits, and so the hash; a few rounded logits show whether more
than the last bits differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.process import environment
from bench.records.schema import Fingerprint

ROWS = 16  # rows whose class and its logit are recorded
TIED = 2  # rows whose class may differ on another kind of machine
# How much logits may differ on another kind of machine, as a share of the largest of them. TF32 keeps three bits more
# than bfloat16, so an eighth of its tolerance.
TOLERANCE, ROUNDED = 1e-3, {"bfloat16": 5e-2, "tf32": 5e-2 / 8}


def of(logits: NDArray[np.float32], index: int, machine: Mapping[str, Any]) -> Fingerprint:
    """Return the fingerprint of a block's logits [rows, classes], of votes of the image ``index``.

    ``machine``: the environment that computed them.
    """
    values = np.nan_to_num(logits)
    largest = values[:ROWS].max(1)
    return Fingerprint.of(
        {
            "index": index,
            "machine": {k: machine.get(k) for k in environment.MACHINE},
            "sha256": hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest(),
            "classes": values[:ROWS].argmax(1).tolist(),
            "logits": [float(f"{v:.6g}") for v in largest],
        }
    )


def differs(one: Fingerprint, other: Fingerprint, arithmetic: Sequence[str] = ()) -> str:
    """Return how two fingerprints contradict each other; empty where they agree.

    On one kind of machine with the same versions the hashes must be equal; elsewhere the recorded logits must agree
    to a tolerance, and all classes but ``TIED``.
    """
    if one.index != other.index:
        return f"they are of images {one.index} and {other.index}"
    if one.sha256 == other.sha256:
        return ""
    a, b = np.array(one.logits), np.array(other.logits)
    if len({len(values) for found in (one, other) for values in (found.logits, found.classes)}) > 1:
        return "they state different numbers of rows"
    difference = float(np.abs(a - b).max()) / max(float(np.abs(a).max()), 1e-30)
    if environment.same_machine(one.machine.as_json(), other.machine.as_json()):
        return f"logits differ by {difference:.2g} of the largest, on the same kind of machine with the same versions"
    allowed = max([TOLERANCE, *(ROUNDED[word] for word in arithmetic if word in ROUNDED)])
    if difference > allowed:
        return f"logits differ by {difference:.2g} of the largest, more than another machine explains ({allowed:g})"
    changed = int(np.sum(np.array(one.classes) != np.array(other.classes)))
    if changed > TIED:
        return f"{changed} of {len(a)} classes differ, more than another machine explains ({TIED})"
    return ""
