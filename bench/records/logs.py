"""Read released per-image logs with their defects, and write logs.

Formats, both tab-separated under a header, one line an image (other columns are flagged):

``cohen`` (Cohen et al., arXiv 1902.02918, and most since): ``idx label predict radius correct time``, n votes
an image, the radius that of Clopper-Pearson.

``adaptive``: votes that vary by image. Known are the logs of Horvath et al. (arXiv 2106.06946), recognised by a
column ``radius proved`` of 1 and -1 (whether the one radius tested was proved; the log does not say which: give it)
with ``levels_needed``, ``estimated_pr``, ``samples_needed``; and those of Chen et al. (``pA samplesize radius``).

No log holds counts, which stay unknown. Logs of other tools state neither sigma, n, n0 nor alpha: the user gives them
when importing. ``export_log`` adds them as columns, the same in every row (``PARAMETERS``), which readers that take
columns by name ignore. A log is untrusted input: nothing in it is executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.records import audit, flaws
from bench.records.flaws import HUGE, LogParameters, Row
from bench.records.record import ImportedCertificate, Record
from bench.smoothing.votes import MAX_VOTES

VOTES = "samples_needed"  # the column with an image's votes, of adaptive logs
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
PARAMETERS: dict[str, type] = {  # columns of one value each, and its type
    **{"sigma": float, "alpha": float, "n": int, "n0": int},
    **{"noise": str, "target": str, "split": str, "format": str},
}
EXTRA = {
    "cohen": set[str](),
    "adaptive": {
        *("levels_needed", "estimated_pr", VOTES, "early_stoppings", "additional_batches_needed"),
        *("early_stopping_ratio", "additional_batches", "pa", "radius proved"),
    },
}
IMAGES = 1_000_000  # of a log, at most
LONGEST = 10_000  # characters of a line
ALIASES = {"samplesize": VOTES, "time_forward": "time"}


@dataclass(frozen=True)
class Log:
    """A log as read: its images by index, and a line for each defect."""

    certificates: list[ImportedCertificate]
    flags: list[str]


@dataclass(frozen=True)
class _Header:
    """Where the rows start, what separates their fields (None: any blanks), and the names of the columns."""

    start: int
    separator: str | None
    columns: list[str]


def read_log(data: bytes, parameters: LogParameters, radii: Sequence[float], classes: int) -> Log:
    """Read a log. Raises BenchError where it is no such log at all.

    ``radii`` are the table's; ``classes`` is 0 where not known.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BenchError("not a text file; import takes tab-separated logs") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    flags: list[str] = []
    header = _header(lines, parameters.format, flags)
    rows, columns = _rows(lines, header, flags), header.columns
    if not rows:
        raise BenchError("none of its lines is an image's: idx, label, predict and radius must be numbers")
    known = _same_in_all(rows)
    if varied := [c for c in PARAMETERS if c in columns and c not in known and any(r.fields[c] for r in rows)]:
        flags.append(f"unknown columns, left out: {', '.join(varied)}")
    for column, value in known.items():
        if getattr(parameters, column) not in (None, value):
            flags.append(f"its column {column} says {value}; {getattr(parameters, column)} was given")
    flags += flaws.structure(rows, parameters, classes)
    flags += flaws.stops(rows, parameters.target)
    predicted = [r for r in rows if r.predicted >= 0 and not flaws.stopped(r, parameters.target)]
    if parameters.format == "adaptive" and ("radius proved" in columns or {r.radius for r in rows} == {-1.0, 1.0}):
        if parameters.radius is None:
            raise BenchError("it says only whether a radius was proved, not which: give the radius with --radius")
        proved = [r for r in predicted if r.radius > 0]
        flags += flaws.support(proved, np.full(len(proved), parameters.radius), np.zeros(len(proved)), parameters)
        found = [_certificate(r, parameters, parameters.radius if r.radius > 0 else -1) for r in rows]
    else:
        if parameters.radius is not None:
            raise BenchError("it has radii of its own; leave --radius out")
        flags += flaws.abstentions(rows)
        certified = [r for r in predicted if r.radius > 0]
        sizes = np.array([r.radius for r in certified], np.float64)
        units = flaws.units(certified)
        flags += flaws.support(certified, sizes, units, parameters)
        if parameters.format == "cohen":
            flags += flaws.counts(certified, sizes, units, parameters)
        flags += flaws.coarse(certified, sizes, units, parameters.sigma, radii)
        found = [_certificate(r, parameters, r.radius) for r in rows]
    unread = [r for r, c in zip(rows, found, strict=True) if c.seconds is None and r.fields.get("time")]
    if unread:
        flags.append(f"times that cannot be read: {flaws.affected(unread)}")
    return Log(sorted(found, key=lambda c: c.index), flags)


def stated_in(data: bytes) -> dict[str, Any]:
    """Return the ``PARAMETERS`` that a log states; none where it cannot be read."""
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return _same_in_all(_rows(lines, _header(lines, "adaptive", []), []))
    except (BenchError, UnicodeDecodeError):
        return {}  # read_log reports why


def _same_in_all(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, kind in PARAMETERS.items():
        values = {r.fields.get(column, "") for r in rows}
        if len(values) != 1 or not (text := values.pop()):
            continue
        try:
            value = kind(text)
        except ValueError:
            continue
        if _possible(column, value):
            found[column] = value
    return found


def _possible(column: str, value: Any) -> bool:
    """Return whether any certificate can have this value of a parameter."""
    if isinstance(value, str):
        return value in flaws.FORMATS if column == "format" else flaws.allowed(column, value)
    if isinstance(value, int):
        return 1 <= value <= MAX_VOTES
    return bool(0 < value < (1 if column == "alpha" else HUGE))


def _header(lines: Sequence[str], format: str, flags: list[str]) -> _Header:
    start = next((i for i, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise BenchError("it is empty")
    if len(lines[start]) > LONGEST:
        raise BenchError(f"its first line has more than {LONGEST:,} characters; logs have a short header")
    separator = "\t" if "\t" in lines[start] else None
    columns = [c.strip().lower() for c in lines[start].strip().split(separator)]
    if columns[0].isdecimal() and len(columns) == len(COLUMNS):
        flags.append(f"no header: the columns are taken for {' '.join(COLUMNS)}")
        return _Header(start, separator, list(COLUMNS))
    columns = [ALIASES.get(c, c) if format == "adaptive" else c for c in columns]
    if "radius proved" in columns and format == "cohen":
        raise BenchError("its column 'radius proved' is that of an adaptive log; import it with --format adaptive")
    had = {"radius" if c == "radius proved" else c for c in columns}
    if lacking := [c for c in COLUMNS[:4] if c not in had]:
        raise BenchError(
            f"no column {', '.join(lacking)}; {format} logs have the header {' '.join(COLUMNS)}, with tabs"
        )
    if lacking := [c for c in COLUMNS[4:] if c not in had]:
        flags.append(f"no column {', '.join(lacking)}")
    if twice := [c for c, count in Counter(columns).items() if count > 1]:
        raise BenchError(f"column {_safe(twice[0])} is there twice")
    if others := [c for c in columns if c not in {*COLUMNS, *PARAMETERS, *EXTRA[format]}]:
        flags.append(f"unknown columns, left out: {', '.join(map(_safe, others[:10]))}")
    return _Header(start + 1, separator, columns)


def _safe(text: str) -> str:
    """Return a name from an untrusted file, fit for a message."""
    return re.sub(r"[^A-Za-z0-9_. -]", "?", text)[:30] or "(no name)"


def _rows(lines: Sequence[str], header: _Header, flags: list[str]) -> list[Row]:
    """Return the first row of every image."""
    columns = header.columns
    rows: dict[int, Row] = {}
    bad: list[int] = []
    again: list[Row] = []
    for number, line in enumerate(lines[header.start :], header.start + 1):
        if not line.strip():
            continue
        if len(line) > LONGEST:
            bad.append(number)
            continue
        values = [v.strip() for v in line.split(header.separator)]
        fields = dict(zip(columns, values, strict=False))
        try:
            if len(values) < len(columns) or any(values[len(columns) :]):
                raise ValueError
            row = Row(
                fields,
                _whole(fields["idx"], 0),
                _whole(fields["label"], 0),
                _whole(fields["predict"], -1),
                float(Decimal(fields.get("radius", fields.get("radius proved", "")))),
            )
            if not abs(row.radius) < HUGE:
                raise ValueError
        except (ValueError, ArithmeticError):
            bad.append(number)
            continue
        if row.index in rows:
            again.append(row)
        rows.setdefault(row.index, row)
        if len(rows) > IMAGES:
            raise BenchError(f"more than {IMAGES:,} images; import a part of it")
    if bad:
        flags.append(f"lines that are no image's, left out: {len(bad)}, line {bad[0]} first")
    if again:
        differ = sum(r.values != rows[r.index].values for r in again)
        flags.append(f"images twice, the first row kept: {flaws.affected(again)}; {differ} of them say something else")
    return list(rows.values())


def _whole(text: str, least: int) -> int:
    value = Decimal(text)
    if not least <= value <= 2**53 or value != int(value):
        raise ValueError
    return int(value)


def _certificate(row: Row, parameters: LogParameters, radius: float) -> ImportedCertificate:
    abstained = row.predicted < 0 or radius < 0
    stopped = flaws.stopped(row, parameters.target)
    samples = row.fields.get(VOTES, "")
    votes = int(samples) if re.fullmatch(r"\d{1,15}", samples) else None
    if parameters.format == "cohen" and (parameters.n0 or parameters.target == "label"):
        selection = parameters.n0 or 0 if parameters.target != "label" else 0
        votes = selection + (0 if stopped else parameters.n)
    return ImportedCertificate(
        index=row.index,
        label=row.label,
        predicted=None if abstained and not stopped else row.predicted,
        radius=0.0 if abstained or stopped else radius,
        votes=votes,
        seconds=_seconds(row.fields.get("time", "")),
    )


def _seconds(text: str) -> float | None:
    """Parse seconds, or [D days, ]H:MM:SS[.ffffff]; None where it is neither."""
    days, hours, minutes, seconds = 0, 0, 0, text
    if found := re.fullmatch(r"(?:(\d{1,6}) days?, )?(\d{1,6}):(\d{1,2}):([\d.]+)", text):
        days, hours, minutes = (int(v or 0) for v in found.groups()[:3])
        seconds = found[4]
    try:
        value = float(seconds)
    except ValueError:
        return None
    return 86400 * days + 3600 * hours + 60 * minutes + value if 0 <= value < HUGE else None


def export_log(record: Record) -> str:
    """Write a finished run in the common format: radii with all their digits, times in seconds, ``PARAMETERS``."""
    if problem := audit.problem(record):
        raise BenchError(problem)
    identity, sampling = record.identity, record.identity.sampling
    fixed = sampling.kind == "fixed"
    same: list[Any] = [identity.sigma, sampling.alpha, sampling.n, sampling.n0]  # in the order of PARAMETERS
    same += [identity.noise.kind, sampling.target, identity.split, "cohen" if fixed else "adaptive"]
    lines = ["\t".join([*COLUMNS, *PARAMETERS, *([] if fixed else [VOTES])])]
    for c in sorted(record.certificates, key=lambda c: c.index):
        predict = -1 if c.predicted is None else c.predicted
        # Trailing zeros stay, since readers take the digits of a log for its precision.
        fields = (c.index, c.label, predict, f"{c.radius:#.17g}", int(predict == c.label), c.seconds, *same)
        fields += () if fixed else (c.votes,)
        lines.append("\t".join("" if v is None else str(v) for v in fields))
    return "\n".join(lines) + "\n"
