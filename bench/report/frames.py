"""Results as data frames, and as HTML in a notebook."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from typing import Any

import pandas as pd

from bench.records.columns import NULL
from bench.records.record import ImportedCertificate, Record
from bench.report.rows import read_row
from bench.report.tables import Report
from bench.smoothing.votes import Certificate

_NAMES = [one.name for one in fields(Certificate)]
_ORDER = [
    "index",
    "label",
    "predicted",
    "radius",
    *(n for n in _NAMES if n not in ("index", "label", "predicted", "radius")),
]
_FLOATS = ("radius", "p_lower", "seconds")


def runs(report: Report) -> pd.DataFrame:
    """Return one row a run: its table, what identifies it, and the columns of csv and json."""
    rows = []
    for number, table in enumerate(report.tables):
        for record in (record for method in table.methods for record in method.records):
            identity, sampling = record.identity, record.identity.sampling
            columns = read_row(record, table.setting.radii).columns()
            about = {
                "run": columns.pop("run"),
                "table": number,
                "dataset": identity.dataset,
                "split": identity.split,
                "sigma": identity.sigma,
                "train_sigma": identity.train_sigma,
                "noise": identity.noise.kind,
                "procedure": sampling.kind,
                "target": sampling.target,
                "n0": sampling.n0,
                "n": sampling.n,
                "alpha": sampling.alpha,
                "base": table.setting.base,
                "preset": record.info.preset,
                "path": str(record.path),
                "identity": identity.sha256,
            }
            rows.append({**about, **columns})
    # Tables may have other radii: their columns stand together, by radius.
    every = dict.fromkeys(name for row in rows for name in row)
    names = sorted((name for name in every if _radius(name) >= 0), key=_radius)
    others = [name for name in rows[0] if name not in names]
    first = others.index("family")
    return pd.DataFrame(rows)[[*others[:first], *names, *others[first:]]]


def _radius(name: str) -> float:
    """Return the radius of a column of certified accuracy; -1 for another column."""
    found = re.fullmatch(r"certified_(.*?)(_low|_high)?", name)
    return float(found[1]) if found else -1.0


def certificates(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row an image of each run, in the records' order; what is not known is missing."""
    return pd.concat([_of_run(record) for record in records], ignore_index=True)


def _of_run(record: Record) -> pd.DataFrame:
    lines, known = record.certificates, _NAMES
    if record.imported:
        known = [one.name for one in fields(ImportedCertificate) if one.type != "None"]
    columns: dict[str, Any] = {"run": [record.path.name] * len(lines)}
    for name in _ORDER:
        if name not in known:
            missing: Any = float("nan") if name in _FLOATS else pd.NA
            columns[name] = pd.array([missing] * len(lines), "Float64" if name in _FLOATS else "Int64")
            continue
        values = lines.column(name)
        if name in _FLOATS:
            columns[name] = values
        else:
            columns[name] = pd.Series(values, dtype="Int64").mask(values == NULL)
    if record.info.classes:
        for name in ("label", "predicted"):
            columns[f"{name}_name"] = [
                pd.NA if pd.isna(i) or not 0 <= i < len(record.info.classes) else record.info.classes[i]
                for i in columns[name]
            ]
    return pd.DataFrame(columns)


def html(report: Report) -> str:
    """Return the tables with their default columns; text of records is escaped."""
    parts = []
    for table in report.tables:
        head = [escape(str(title)).replace("\n", "<br>") for title in table.few.cells]
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(str(cell))}</td>" for cell in row) + "</tr>"
            for row in table.few.cells.itertuples(index=False)
        )
        titles = "".join(f"<th>{title}</th>" for title in head)
        parts.append(
            f"<h4>{escape(table.setting.heading)}</h4><p>{escape(table.verdict)}</p><table><thead><tr>{titles}</tr>"
            f"</thead><tbody>{body}</tbody></table><p><small>{escape(f'{table.few.note} {table.notes}')}</small></p>"
        )
    return "".join(parts)


def _cell(text: str) -> str:
    first, line, second = escape(text).partition("\n")
    return f"{first}<br><small>{second}</small>" if line else first
