"""Find what keeps a record out of reports: unfinished, other images, or certificates that do not hold.

Fast enough for every reader of finished runs; ``bench verify`` checks the same at high precision, and more.
"""

from __future__ import annotations

import numpy as np

from bench.records.columns import NULL
from bench.records.lines import certificates_file, sha256
from bench.records.record import Record

# Relative difference allowed between recorded and recomputed numbers: versions of scipy differ by less than 1e-12.
TOLERANCE = 1e-9


def problem(record: Record) -> str:
    """Return why the record's certificates are not to be shown as results; empty if they may be."""
    done, images = len(record.certificates), len(record.identity.indices)
    if not record.complete:
        return f"{record.path}: unfinished ({done} of {images} images); repeat the bench run command to finish it"
    if not record.whole:
        return f"{record.path}: corrupt: finished with {images} images, but certificates.jsonl holds other ones"
    stated = record.info.certificates_sha256  # None: written before there was one
    if stated is not None and sha256(certificates_file(record.path)) != stated:
        return f"{record.path}: certificates.jsonl was changed after the run finished; restore it, or run again"
    if not record.imported and (wrong := _unsupported(record)):
        return f"{record.path}: {wrong}; bench verify {record.path} says more"
    return ""


def _unsupported(record: Record) -> str:
    """Return the first certificate that does not follow from its counts by the run's procedure."""
    identity, lines = record.identity, record.counted
    procedure = identity.procedure
    n, top, index = (lines.column(name) for name in ("n", "top_count", "index"))
    if (wrong := (top > n) | (n > procedure.n)).any():
        at = int(wrong.argmax())
        return f"image {index[at]}: {top[at]} of {n[at]} votes, but the procedure draws at most {procedure.n}"
    # Images share counts, so each pair is computed once; n is below 2**31.
    pairs, place = np.unique(n << 31 | top, return_inverse=True)
    implied = np.empty((len(pairs), 2))
    for k, pair in enumerate(pairs.tolist()):
        try:
            implied[k] = procedure.recompute(identity.sigma, pair >> 31, pair & (2**31 - 1), identity.noise.tau)
        except ValueError as e:
            return f"image {index[int((place == k).argmax())]}: {e}"
    p_lower, radius = implied[place].T
    predicted, label = lines.column("predicted"), lines.column("label")
    differs = ~np.isclose(lines.column("radius"), radius, rtol=TOLERANCE, atol=TOLERANCE * identity.sigma)
    differs |= ~np.isclose(lines.column("p_lower"), p_lower, rtol=TOLERANCE, atol=TOLERANCE)
    if differs.any():
        at = int(differs.argmax())
        stated = lines[at]
        return (
            f"image {index[at]}: p_lower {stated.p_lower} and radius {stated.radius} are recorded, "
            f"but {top[at]} of {n[at]} votes give {p_lower[at]} and {radius[at]}"
        )
    tests_label = procedure.target != "selected"
    stopped = tests_label & (n == 0)  # of target "correct": the selected class is wrong, and no votes bound it
    differs = ((predicted == NULL) != (p_lower <= 0.5)) & ~stopped
    if tests_label:
        differs |= (predicted != NULL) & (predicted != label) & ~stopped
        differs |= stopped & ((predicted == NULL) | (predicted == label))
    if differs.any():
        at = int(differs.argmax())
        return f"image {index[at]}: the recorded prediction does not follow from {top[at]} of {n[at]} votes"
    return ""
