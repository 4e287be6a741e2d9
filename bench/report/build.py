"""Tables and figures of run folders, written as markdown, LaTeX, csv, json or a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import BenchError
from bench.io.files import digest, write_text, writing
from bench.records.grouping import comparable, groups, heading, reach
from bench.records.record import Record
from bench.report import envelopes, latex
from bench.report.cells import columns, label, limits
from bench.report.envelopes import Envelope
from bench.report.figures import TRADEOFF, curves, tradeoff
from bench.report.published import beside
from bench.report.published import heading as published_heading
from bench.report.tables import level_with_best, pooled, table
from bench.text import escape


def _markdown(group: Sequence[Record], published: bool) -> str:
    frame = pooled(group)
    written_by_others = ["defense", "family", "trains", "extra data"]
    cells = columns(group)
    cells[written_by_others] = cells[written_by_others].map(escape)
    body = cells.to_markdown(index=False, disable_numparse=True)
    flagged = [escape(f"{label(row, frame)}: {row['flags']}") for row in frame.to_dict("records") if row["flags"]]
    text = "\n\n".join([f"### {escape(heading(group[0]))}", body, limits(group), *flagged]) + "\n"
    if published and len(others := beside(group[0])):
        italic = others.assign(published=[f"*{p}*" for p in others["published"]])
        text += f"\n{published_heading(group)}\n\n{italic.to_markdown(index=False, disable_numparse=True)}\n"
    return text


def _latex(group: Sequence[Record], published: bool) -> str:
    """The columns that a paper has room for; everything from a record escaped."""
    frame, cells, within = pooled(group), columns(group), reach(group[0])
    accuracies: dict[str, list[str]] = {}
    for r in group[0].info.radii:
        key, tied = f"certified_{r:g}", level_with_best(group, frame, r) if r <= within else set[str]()
        accuracies[f"{r:g}"] = [
            latex.interval(row[key], row[f"{key}_low"], row[f"{key}_high"], row["run"] in tied) if r <= within else "--"
            for row in frame.to_dict("records")
        ]
    costs = {
        f"\\shortstack[r]{{{title}}}": [*map(latex.escape, cells[column])]
        for column, title in (
            ("train (s)", "train\\\\(s)"),
            ("GFLOPs / vote", "GFLOPs\\\\a vote"),
            ("trained here", "trained\\\\here"),
        )
    }
    names = [*map(latex.escape, cells["defense"])]
    title = "certified accuracy in \\% at radius"
    said = limits(group).replace("=: not", "Bold: not")
    parts = [latex.table(names, [(title, pd.DataFrame(accuracies)), ("", pd.DataFrame(costs))])]
    if published and len(others := beside(group[0])):
        facts = others.map(latex.escape).set_axis([*map(latex.escape, others)], axis=1)
        text = f"p{{{(0.96 - 0.105 * (facts.shape[1] - 2)) / 2:.2f}\\columnwidth}}"
        form = f"@{{}}{text}{'r' * (facts.shape[1] - 2)}{text}@{{}}"
        body = facts.to_latex(index=False, escape=False, column_format=form)
        parts.append(
            latex.comment(published_heading(group)) + f"{{\\tiny\\setlength{{\\tabcolsep}}{{2pt}}%\n{body}}}\n"
        )
    return latex.comment(heading(group[0])) + latex.comment(said) + "\n".join(parts)


def _envelope_markdown(envelope: Envelope) -> str:
    if not envelope.rows:
        return f"{escape(envelope.note)}\n"
    cells = envelopes.columns(envelope)
    cells["defense"] = cells["defense"].map(escape)
    body = cells.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([f"### {escape(envelope.heading)}", body, escape(envelope.note)]) + "\n"


def _envelope_latex(envelope: Envelope) -> str:
    note = latex.comment(envelope.note)
    if not envelope.rows:
        return note
    cells: dict[str, list[str]] = {"among": [", ".join(f"{s:g}" for s in row.sigmas) for row in envelope.rows]}
    for radius in envelope.record.info.radii:
        points = [next((p for p in row.points if p.radius == radius), None) for row in envelope.rows]
        cells[f"{radius:g}"] = [
            latex.interval(p.value, p.low, p.high, more=f" ({p.sigma:g})") if p else "--" for p in points
        ]
    title = "certified in \\% at radius (sigma chosen)"
    names = [latex.escape(row.label) for row in envelope.rows]
    return latex.comment(envelope.heading) + note + latex.table(names, [(title, pd.DataFrame(cells))], latex.CHOSEN)


def _as_json(envelope: Envelope) -> dict[str, Any]:
    rows = [asdict(row) for row in envelope.rows]
    said = {"heading": envelope.heading, "note": envelope.note, "validation_images": envelope.validation_images}
    return said | {"rows": rows, "lacking": envelope.lacking}


def figure_name(record: Record) -> str:
    """The name of the figures of a record's table, by what its runs have in common and independent of other tables."""
    identity = record.identity
    dataset = re.sub(r"[^\w.-]", "-", identity.dataset)  # part of a file's name, from untrusted input
    split = "" if identity.split == "test" else "-validation"
    return f"{dataset}{split}-s{identity.sigma:g}-{digest(comparable(record))[:8]}"


def render(records: Sequence[Record], format: str, published: bool = False) -> str:
    """All groups as md, latex, csv or json text, and envelopes over sigma (not in csv, which has a line a run).

    ``published`` adds others' numbers below md and latex tables.
    """
    tables, over_sigma = groups(records), envelopes.find(records)
    if format == "csv":
        frames = [table(g).assign(table=i) for i, g in enumerate(tables)]
        return str(pd.concat(frames, ignore_index=True).to_csv(index=False)) if frames else ""
    if format == "json":
        out = [{"heading": heading(g[0]), "rows": json.loads(table(g).to_json(orient="records"))} for g in tables]
        return json.dumps({"tables": out, "envelopes": [_as_json(e) for e in over_sigma]}, indent=1) + "\n"
    if format == "latex":
        parts = [*(_latex(g, published) for g in tables), *map(_envelope_latex, over_sigma)]
        return "\n".join([latex.PREAMBLE, *parts])
    parts = [_markdown(g, published) for g in tables]
    if len(parts) > 1:
        parts.insert(0, "Each table holds only runs on the same images, base, sigma, n0, n and alpha.\n")
    parts += map(_envelope_markdown, over_sigma)
    return "\n".join(parts)


SUFFIXES = {".md": "md", ".tex": "latex", ".csv": "csv", ".json": "json", ".html": "html"}
ALIASES = {".markdown": ".md", ".latex": ".tex", ".htm": ".html"}
OTHERS = (".txt", ".pdf", ".png", ".svg", ".tsv", ".xlsx", ".parquet")


def format_of(out: Path | None, format: str | None) -> str:
    """The format of a report: as the name of its file says, or as given. Raises BenchError where they differ."""
    suffix = out.suffix.lower() if out is not None and not out.is_dir() else ""
    named = SUFFIXES.get(ALIASES.get(suffix, suffix))
    if suffix in OTHERS:
        raise BenchError(f"--out {out}: a report is written as {', '.join(SUFFIXES)}, or into a folder")
    if named and format and named != format:
        raise BenchError(f"--out {out} with --format {format}: the name is that of {named}; leave one of the two out")
    return named or format or "md"


def write(
    records: Sequence[Record], format: str, out: Path, published: bool = False, left_out: Sequence[str] = ()
) -> list[Path]:
    """The report and, for markdown and LaTeX, its figures: into the folder ``out``, or to the file it names.

    A page (html) also names what was ``left_out``. Returns the files written. Raises BenchError where they cannot be.
    """
    suffix = next(s for s, f in SUFFIXES.items() if f == format)
    named = ALIASES.get(out.suffix.lower(), out.suffix.lower()) == suffix and not out.is_dir()
    report = out if named else out / f"report{suffix}"
    with writing(f"the report to {out}", "choose another place with --out"):
        report.parent.mkdir(parents=True, exist_ok=True)
        if format == "html":
            from bench.report.page import page  # it builds on this module, and on Plotly, which takes a while to import

            text = page(records, left_out)
        else:
            text = render(records, format, published)
        files = [report]
        if format in ("md", "latex"):
            for group in groups(records):
                name = figure_name(group[0])
                name = f"{out.stem}-{name}" if report == out else name
                made = {draw: draw(group, report.parent, name) for draw in (curves, tradeoff)}
                files += [file for figures in made.values() for file in figures]
                if format == "md":
                    text += f"\n![{escape(heading(group[0]))}]({name}.svg)\n![{TRADEOFF}]({name}-cost.svg)\n"
        write_text(report, text)
    return files
