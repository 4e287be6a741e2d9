"""Tables and figures of run folders, written as markdown, LaTeX, csv, json or a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import BenchError
from bench.io.files import digest, write_text, writing
from bench.records import paired
from bench.records.record import Record
from bench.report import envelopes, latex
from bench.report.envelopes import Envelope
from bench.report.figures import TRADEOFF, curves, tradeoff
from bench.report.published import beside
from bench.report.published import heading as published_heading
from bench.report.tables import DASH, comparable, escape, groups, heading, level_with_best, pooled, reach, table
from bench.smoothing import bounds


def columns(group: Sequence[Record]) -> pd.DataFrame:
    """The table of one group as text: percent with 95% intervals, a dash for what cannot be or is not known."""
    frame, radii = pooled(group), group[0].info["radii"]
    within, rows = reach(group[0]), frame.to_dict("records")
    shown: dict[str, list[str]] = {"defense": [_label(row, frame) for row in rows]}
    for r in radii:
        key = f"certified_{r:g}"
        title = "smoothed accuracy (r = 0)" if r == 0 else f"certified at r = {r:g}"
        tied = level_with_best(group, frame, r) if r <= within else set()
        shown[title] = [
            f"{row[key]:.1%} [{row[f'{key}_low']:.1%}, {row[f'{key}_high']:.1%}]{' =' if row['run'] in tied else ''}"
            if r <= within
            else DASH
            for row in rows
        ]
    shown |= {
        "family": [v or DASH for v in frame["family"]],
        "trains": list(frame["trains"]),
        "base, clean": _numbers(frame["base_clean_accuracy"], ".1%"),
        "abstained": _numbers(frame["abstained"], ".1%"),
        "train (s)": _numbers(frame["train_seconds"], ".1f"),
        "certify (s)": _numbers(frame["certify_seconds"], ".1f"),
        "votes": _numbers(frame["votes"], ",.0f"),
        "GFLOPs / vote": _numbers(frame["flops_per_vote"], ".4g", 1e9),
        "trained here": _numbers(frame["trained_here"], ",.0f"),
        "trained elsewhere": _numbers(frame["trained_elsewhere"], ",.0f"),
        "parameters": _numbers(frame["parameters"], ",.0f"),
        "extra data": [DASH if group[0].imported else v or "no" for v in frame["extra_data"]],
        "peak memory (MB)": _numbers(frame["peak_memory"], ",.0f", 1e6),
        "ACR": _numbers(frame["acr"], ".3f"),
    }
    return pd.DataFrame(shown)


def _numbers(values: pd.Series, form: str, unit: float = 1) -> list[str]:
    """Numbers of a column, a dash for what is not known."""
    return [DASH if pd.isna(v) else format(v / unit, form) for v in values]


def _markdown(group: Sequence[Record], published: bool) -> str:
    frame = pooled(group)
    written_by_others = ["defense", "family", "trains", "extra data"]
    cells = columns(group)
    cells[written_by_others] = cells[written_by_others].map(escape)
    body = cells.to_markdown(index=False, disable_numparse=True)
    flagged = [escape(f"{_label(row, frame)}: {row['flags']}") for row in frame.to_dict("records") if row["flags"]]
    text = "\n\n".join([f"### {escape(heading(group[0]))}", body, limits(group), *flagged]) + "\n"
    if published and len(others := beside(group[0])):
        italic = others.assign(published=[f"*{p}*" for p in others["published"]])
        text += f"\n{published_heading(group)}\n\n{italic.to_markdown(index=False, disable_numparse=True)}\n"
    return text


def _latex(group: Sequence[Record], published: bool) -> str:
    """The columns that a paper has room for; everything from a record escaped."""
    frame, cells, within = pooled(group), columns(group), reach(group[0])
    accuracies: dict[str, list[str]] = {}
    for r in group[0].info["radii"]:
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
    for radius in envelope.record.info["radii"]:
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
    dataset = re.sub(r"[^\w.-]", "-", identity["dataset"])  # part of a file's name, from untrusted input
    split = "" if identity["split"] == "test" else "-validation"
    return f"{dataset}{split}-s{identity['sigma']:g}-{digest(comparable(record))[:8]}"


def limits(group: Sequence[Record]) -> str:
    """State in a few sentences what the table shows and what it cannot show."""
    record, frame = group[0], pooled(group)
    split = record.identity["split"]
    within = [r for r in record.info["radii"] if r <= reach(record)]
    widths = [frame[f"certified_{r:g}_high"] - frame[f"certified_{r:g}_low"] for r in within]
    wide = max((float(w.max()) for w in widths), default=0.0) / 2
    text = "" if split == "test" else f"These are {split} images, to choose by: no result of any defense. "
    if len(frame) > 1 and (above := [r for r in within if r > 0]):
        best = frame.iloc[int(frame[f"certified_{above[0]:g}"].argmax())]
        tied = level_with_best(group, frame, above[0])
        others = [_label(row, frame) for row in frame.to_dict("records") if row["run"] in tied - {best["run"]}]
        text += (
            f"At r = {above[0]:g} {_label(best, frame)} certifies the most images "
            f"({best[f'certified_{above[0]:g}']:.1%}); "
            + (
                f"not significantly worse: {', '.join(others)}. "
                if others
                else "all other rows are significantly worse. "
            )
        )
    text += f"With {frame['images'].iloc[0]:.0f} images the margin of error is up to {100 * wide:.0f} points "
    if (several := frame["seeds"] > 1).any():
        spread = max((float(frame[f"certified_{r:g}_spread"].max()) for r in within), default=0.0)
        text += (
            "(brackets: 95% Clopper-Pearson limits at the mean over seeds, conservative where seeds disagree). They "
            "and the tests cover the choice of images, for these trained models, and not the choice of seeds: seeds of "
            f"one method differ by up to {100 * spread:.1f} points. "
        )
    else:
        text += "(brackets: 95% Clopper-Pearson intervals). "
    if len(frame) > 1:
        pairs = len(frame) * (len(frame) - 1) // 2
        test = "exact sign-flip (with one seed McNemar)" if several.any() else "McNemar's exact"
        text += (
            f"=: not significantly worse than the best in that column ({test} tests on the same images, "
            f"{paired.LEVEL:.0%} level, Holm's correction over "
            + (f"all {pairs} pairs of rows; each column is corrected by itself). " if pairs > 1 else "the one pair). ")
        )
    # Rounded up, so that no certificate lies beyond what is printed.
    text += f"With these votes no image can be certified beyond r = {bounds.printed_reach(reach(record))} (a dash)."
    if record.identity["noise"]["kind"] == "grid":
        text += " Grid noise: a certificate covers every image of integer pixel values within its radius."
    if record.imported:
        text += (
            " Imported from released logs: sigma, votes and alpha are as whoever imported them states, counts are not "
            "known, images by index alone, a dash is also what a log does not say. †: it has defects, below."
        )
    elif (headless := frame["base_clean_accuracy"].isna()).any():
        text += (
            " The base was trained on other classes: with a dash under 'base, clean' the defense brought its own head"
        )
        text += "." if headless.all() else ", else a linear probe on clean images gave it one."
    if record.info["preset"] == "quick":
        text += " Preset quick trains briefly on a small budget: it ranks methods at that budget, not at their papers'."
    return text


def _label(row: Mapping[Any, Any] | pd.Series, frame: pd.DataFrame) -> str:
    """The method's name, with its number of seeds, or its run's hash where the name alone says too little."""
    text = str(row["defense"]) + (" †" if row["flags"] else "")
    if (frame["defense"] == row["defense"]).sum() == 1:
        return text + (f" ({row['seeds']:.0f} seeds)" if row["seeds"] > 1 else "")
    seed = "" if pd.isna(row["seed"]) else f" seed {row['seed']:.0f}"
    return f"{text}{seed} ({str(row['run']).rpartition('-')[2]})"


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
