"""A report as markdown, LaTeX, csv or json text."""

from __future__ import annotations

import json
from dataclasses import asdict

import pandas as pd

from bench.errors import shown
from bench.report import attacked, latex
from bench.report.envelopes import Envelope
from bench.report.published import heading as published_heading
from bench.report.shift import Shift
from bench.report.tables import Report, Table
from bench.text import escape

FORMATS = ("md", "latex", "csv", "json")
_FROM_RECORDS = ["defense", "family", "trains", "extra data"]  # columns whose text is untrusted


def render(report: Report, format: str, every: bool = False) -> str:
    """Write all tables, then best-sigma curves and splits compared (not in csv: a line a run). ``format``: of FORMATS.

    ``every``: all columns in markdown; csv and json have them always, LaTeX has no room for them.
    """
    if format == "md":
        return _markdown(report, every)
    return {"latex": latex.render, "csv": _csv, "json": _json}[format](report)


def _markdown(report: Report, every: bool) -> str:
    parts = [_table(table, every) for table in report.tables]
    if len(parts) > 1:
        parts.insert(0, "Each table holds only runs on the same images, base, sigma, n0, n and alpha.\n")
    study = [f"Runs of the study {escape(report.study.name)}, sha256 {report.study.sha256}.\n"] if report.study else []
    return "\n".join([*parts, *map(_envelope, report.envelopes), *map(_shift, report.shifts), *study])


def _table(table: Table, every: bool) -> str:
    """Write the verdict, the table, and what it cannot show."""
    shown, notes = (table.cells, table.notes) if every else (table.few.cells, f"{table.few.note} {table.notes}")
    untrusted = [column for column in _FROM_RECORDS if column in shown]
    shown = shown.assign(**{column: shown[column].map(escape) for column in untrusted})
    flagged = [escape(f"{m.label}: {m.row.flags}") for m in table.methods if m.row.flags]
    verdict = filter(None, [escape(table.verdict)])
    text = "\n\n".join([f"### {escape(table.setting.heading)}", *verdict, _grid(shown), escape(notes), *flagged]) + "\n"
    if len(table.published):
        italic = table.published.assign(published=[f"*{p}*" for p in table.published["published"]])
        text += f"\n{published_heading(table.setting)}\n\n{_grid(italic)}\n"
    return text + _attacks(table)


def _attacks(table: Table) -> str:
    """Write certified and attacked accuracy side by side, with the budgets of the attacks."""
    if not table.attacks:
        return ""
    parts = [f"#### {attacked.TITLE}"]
    if table.attacks.shown:
        parts.append(_grid(attacked.cells(table.attacks.shown).map(escape)))
    return "\n" + "\n\n".join([*parts, escape(table.attacks.note)]) + "\n"


def _envelope(envelope: Envelope) -> str:
    if not envelope.curves:
        return f"{escape(envelope.note)}\n"
    shown = envelope.cells()
    shown["defense"] = shown["defense"].map(escape)
    return "\n\n".join([f"### {escape(envelope.heading)}", _grid(shown), escape(envelope.note)]) + "\n"


def _shift(shift: Shift) -> str:
    parts = [f"### {escape(shift.title)}"]
    for title, cells in shift.cells():
        parts += [f"{title}:", _grid(cells.assign(defense=cells["defense"].map(escape)))]
    return "\n\n".join([*parts, escape(shift.note)]) + "\n"


def _grid(cells: pd.DataFrame) -> str:
    """Write a table of cells already escaped; the second line of a cell is smaller."""
    titles = [str(title).replace("\n", "<br>") for title in cells]
    below = cells.map(lambda cell: f"{cell}</sub>".replace("\n", "<br><sub>") if "\n" in cell else cell)
    return str(below.set_axis(titles, axis=1).to_markdown(index=False, disable_numparse=True))


def _csv(report: Report) -> str:
    frames = [table.frame().assign(split=table.setting.split, table=i) for i, table in enumerate(report.tables)]
    if not frames:
        return ""
    whole = pd.concat(frames, ignore_index=True)
    return str(whole.map(lambda cell: shown(cell) if isinstance(cell, str) else cell).to_csv(index=False))


def _json(report: Report) -> str:
    tables = [
        {
            "heading": table.setting.heading,
            "rows": json.loads(table.frame().to_json(orient="records")),
            **({"attacks": attacked.as_json(table.attacks)} if table.attacks.shown else {}),
        }
        for table in report.tables
    ]
    envelopes = [
        {
            "heading": envelope.heading,
            "note": envelope.note,
            "validation_images": envelope.validation_images,
            "rows": [asdict(curve) for curve in envelope.curves],
            "lacking": envelope.lacking,
        }
        for envelope in report.envelopes
    ]
    shifts = [{"note": shift.note, **asdict(shift)} for shift in report.shifts]
    return json.dumps({"tables": tables, "envelopes": envelopes, "splits_compared": shifts}, indent=1) + "\n"
