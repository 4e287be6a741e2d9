"""Released per-image logs: read, with all that is found wrong with them, and written.

Formats, both tab-separated under a header, one line an image (other columns are flagged):

``cohen`` (Cohen et al., arXiv 1902.02918, and most since): ``idx label predict radius correct time``, n votes
an image, the radius that of Clopper-Pearson.

``adaptive``: votes that vary by image. Known are the logs of Horvath et al. (arXiv 2106.06946), recognised by a
column ``radius proved`` of 1 and -1 (whether the one radius tested was proved; the log does not say which: give it)
with ``levels_needed``, ``estimated_pr``, ``samples_needed``; and those of Chen et al. (``pA samplesize radius``).

No log holds counts, which stay unknown. Those of others hold neither sigma, n, n0 and alpha: the user who imports
one states them. ``export_log`` adds them as columns, the same in every row (``STATEMENTS``), so that a reader which
takes columns by name is not disturbed. Nothing of a file is trusted or executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.records import audit, flaws
from bench.records.flaws import HUGE, Row, Stated
from bench.records.record import Claim, Record
from bench.smoothing.votes import MAX_VOTES

VOTES = "samples_needed"  # the column with an image's votes, of adaptive logs
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
STATEMENTS: dict[str, type] = {  # columns of one value each, and its type
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


def read_log(data: bytes, stated: Stated, radii: Sequence[float], classes: int) -> tuple[list[Claim], list[str]]:
    """What a log says of each image, by index, and a line for each thing wrong with it.

    ``radii`` are the table's; ``classes`` is 0 where not known. Raises BenchError where it is no such log at all.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BenchError("not a text file; import takes tab-separated logs") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    flags: list[str] = []
    start, separator, columns = _header(lines, stated.format, flags)
    rows = _rows(lines, start, separator, columns, flags)
    if not rows:
        raise BenchError("none of its lines is an image's: idx, label, predict and radius must be numbers")
    said = _statements(rows)
    if varied := [c for c in STATEMENTS if c in columns and c not in said and any(r.fields[c] for r in rows)]:
        flags.append(f"unknown columns, left out: {', '.join(varied)}")
    for column, value in said.items():
        if getattr(stated, column) not in (None, value):
            flags.append(f"its column {column} says {value}; {getattr(stated, column)} was given")
    flags += flaws.structure(rows, stated.dataset, classes)
    predicted = [r for r in rows if r.predicted >= 0]
    if stated.format == "adaptive" and ("radius proved" in columns or {r.radius for r in rows} == {-1.0, 1.0}):
        if stated.radius is None:
            raise BenchError("it says only whether a radius was proved, not which: give the radius with --radius")
        proved = [r for r in predicted if r.radius > 0]
        flags += flaws.support(proved, np.full(len(proved), stated.radius), np.zeros(len(proved)), stated)
        claims = [_claim(r, stated, stated.radius if r.radius > 0 else -1) for r in rows]
    else:
        if stated.radius is not None:
            raise BenchError("it has radii of its own; leave --radius out")
        flags += flaws.abstentions(rows)
        certified = [r for r in predicted if r.radius > 0]
        sizes = np.array([r.radius for r in certified], np.float64)
        units = flaws.units(certified)
        flags += flaws.support(certified, sizes, units, stated)
        if stated.format == "cohen":
            flags += flaws.counts(certified, sizes, units, stated)
        flags += flaws.coarse(certified, sizes, units, stated.sigma, radii)
        claims = [_claim(r, stated, r.radius) for r in rows]
    unread = [r for r, c in zip(rows, claims, strict=True) if c.seconds is None and r.fields.get("time")]
    if unread:
        flags.append(f"times that cannot be read: {flaws.some(unread)}")
    return sorted(claims, key=lambda c: c.index), flags


def statements(data: bytes) -> dict[str, Any]:
    """What a log states of itself as a whole, by ``STATEMENTS``; nothing where it is no log that can be read."""
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return _statements(_rows(lines, *_header(lines, "adaptive", []), []))
    except (BenchError, UnicodeDecodeError):
        return {}  # read_log says why


def _statements(rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for column, kind in STATEMENTS.items():
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
    """Whether a statement can be one of any certificate."""
    if isinstance(value, str):
        return value in {**flaws.CHOICES, "format": flaws.FORMATS}[column]
    if isinstance(value, int):
        return 1 <= value <= MAX_VOTES
    return bool(0 < value < (1 if column == "alpha" else HUGE))


def _header(lines: Sequence[str], format: str, flags: list[str]) -> tuple[int, str | None, list[str]]:
    """Where the rows start, what separates their fields (None: any blanks), and the columns' names."""
    start = next((i for i, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise BenchError("it is empty")
    if len(lines[start]) > LONGEST:
        raise BenchError(f"its first line has more than {LONGEST:,} characters; logs have a short header")
    separator = "\t" if "\t" in lines[start] else None
    columns = [c.strip().lower() for c in lines[start].strip().split(separator)]
    if columns[0].isdecimal() and len(columns) == len(COLUMNS):
        flags.append(f"no header: the columns are taken for {' '.join(COLUMNS)}")
        return start, separator, list(COLUMNS)
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
    if others := [c for c in columns if c not in {*COLUMNS, *STATEMENTS, *EXTRA[format]}]:
        flags.append(f"unknown columns, left out: {', '.join(map(_safe, others[:10]))}")
    return start + 1, separator, columns


def _safe(text: str) -> str:
    """A name from a stranger's file, fit for a message."""
    return re.sub(r"[^A-Za-z0-9_. -]", "?", text)[:30] or "(no name)"


def _rows(lines: Sequence[str], start: int, separator: str | None, columns: list[str], flags: list[str]) -> list[Row]:
    """The first row of every image."""
    rows: dict[int, Row] = {}
    bad: list[int] = []
    again: list[Row] = []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip():
            continue
        if len(line) > LONGEST:
            bad.append(number)
            continue
        values = [v.strip() for v in line.split(separator)]
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
        differ = sum((r.label, r.predicted, r.radius) != _said(rows[r.index]) for r in again)
        flags.append(f"images twice, the first row kept: {flaws.some(again)}; {differ} of them say something else")
    return list(rows.values())


def _said(row: Row) -> tuple[int, int, float]:
    return row.label, row.predicted, row.radius


def _whole(text: str, least: int) -> int:
    value = Decimal(text)
    if not least <= value <= 2**53 or value != int(value):
        raise ValueError
    return int(value)


def _claim(row: Row, stated: Stated, radius: float) -> Claim:
    abstained = row.predicted < 0 or radius < 0
    samples = row.fields.get(VOTES, "")
    votes = int(samples) if re.fullmatch(r"\d{1,15}", samples) else None
    if stated.format == "cohen" and (stated.n0 or stated.target == "label"):
        votes = stated.n + (stated.n0 or 0 if stated.target != "label" else 0)
    return Claim(
        index=row.index,
        label=row.label,
        predicted=None if abstained else row.predicted,
        radius=0.0 if abstained else radius,
        votes=votes,
        seconds=_seconds(row.fields.get("time", "")),
    )


def _seconds(text: str) -> float | None:
    """Seconds, or [D days, ]H:MM:SS[.ffffff]; None where it is neither."""
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
    """A finished run in the common format, radii with all their digits, times in seconds, and ``STATEMENTS``."""
    if problem := audit.problem(record):
        raise BenchError(problem)
    identity, procedure = record.identity, record.identity["procedure"]
    fixed = procedure["kind"] == "fixed"
    stated = {**procedure, "target": procedure.get("target", "selected"), "format": "cohen" if fixed else "adaptive"}
    stated |= {"sigma": identity["sigma"], "noise": identity["noise"]["kind"], "split": identity["split"]}
    same = [stated[column] for column in STATEMENTS]
    lines = ["\t".join([*COLUMNS, *STATEMENTS, *([] if fixed else [VOTES])])]
    for c in sorted(record.certificates, key=lambda c: c.index):
        predict = -1 if c.predicted is None else c.predicted
        # Trailing zeros stay, since readers take the digits of a log for its precision.
        fields = (c.index, c.label, predict, f"{c.radius:#.17g}", int(predict == c.label), c.seconds, *same)
        fields += () if fixed else (c.votes,)
        lines.append("\t".join("" if v is None else str(v) for v in fields))
    return "\n".join(lines) + "\n"
