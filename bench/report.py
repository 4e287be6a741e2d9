"""Tables and figures of run folders, written as markdown, csv, json or a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.errors import BenchError
from bench.figures import figure
from bench.store import Record
from bench.tables import groups, heading, pooled, reach, table

DASH = "—"


def columns(group: Sequence[Record]) -> dict[str, list[str]]:
    """The table of one group as shown, rows as in ``pooled``: percent with 95% intervals, a dash out of reach."""
    frame, radii = pooled(group), group[0].info["radii"]
    within = reach(group[0])
    shown: dict[str, list[str]] = {"defense": [_label(row, frame) for _, row in frame.iterrows()]}
    for r in radii:
        key = f"certified_{r:g}"
        title = "smoothed accuracy (r = 0)" if r == 0 else f"certified at r = {r:g}"
        shown[title] = [
            f"{row[key]:.1%} [{row[f'{key}_low']:.1%}, {row[f'{key}_high']:.1%}]" if r <= within else DASH
            for _, row in frame.iterrows()
        ]
    shown |= {
        "kind": list(frame["family"]),
        "base, clean": [f"{v:.1%}" for v in frame["base_clean_accuracy"]],
        "abstained": [DASH if pd.isna(v) else f"{v:.1%}" for v in frame["abstained"]],
        "train (s)": [f"{v:.1f}" for v in frame["train_seconds"]],
        "certify (s)": [f"{v:.1f}" for v in frame["certify_seconds"]],
        "votes": [f"{v:,.0f}" for v in frame["votes"]],
        "GFLOPs / vote": [f"{v / 1e9:.4g}" for v in frame["flops_per_vote"]],
        "trained here": [f"{v:,.0f}" for v in frame["trained_here"]],
        "trained elsewhere": [f"{v:,.0f}" for v in frame["trained_elsewhere"]],
        "parameters": [f"{v:,.0f}" for v in frame["parameters"]],
        "extra data": [v or "no" for v in frame["extra_data"]],
        "peak memory (MB)": [f"{v / 1e6:,.0f}" for v in frame["peak_memory"]],
        "ACR": [f"{v:.3f}" for v in frame["acr"]],
    }
    return shown


def markdown(group: Sequence[Record]) -> str:
    """The table of one group in GitHub markdown."""
    shown = pd.DataFrame(columns(group)).map(lambda cell: cell.replace("|", "\\|"))
    body = shown.to_markdown(index=False, disable_numparse=True)
    return f"### {heading(group[0])}\n\n{body}\n\n{limits(group)}\n"


def limits(group: Sequence[Record]) -> str:
    """What the table cannot show, in a sentence or two."""
    record, frame = group[0], pooled(group)
    within = [r for r in record.info["radii"] if r <= reach(record)]
    widths = [frame[f"certified_{r:g}_high"] - frame[f"certified_{r:g}_low"] for r in within]
    wide = max((float(w.max()) for w in widths), default=0.0) / 2
    text = (
        f"With {frame['images'].iloc[0]:.0f} images an accuracy is known to within {100 * wide:.0f} points at worst "
        f"(brackets: 95% Clopper-Pearson intervals); rows that differ by less are not told apart. "
        f"With these votes no image can be certified beyond r = {reach(record):.3f} (a dash)."
    )
    if record.identity["noise"]["kind"] == "grid":
        text += " Grid noise: a certificate covers every image of integer pixel values within its radius."
    if record.info["preset"] == "quick":
        text += " Preset quick trains briefly on a small budget: it ranks methods at that budget, not at their papers'."
    return text


def _label(row: pd.Series, frame: pd.DataFrame) -> str:
    """The method's name, with its number of seeds, or its run's hash where the name alone says too little."""
    name = str(row["defense"])
    if (frame["defense"] == row["defense"]).sum() == 1:
        return name + (f" ({row['seeds']:.0f} seeds)" if row["seeds"] > 1 else "")
    return f"{name} seed {row['seed']:.0f} ({str(row['run']).rpartition('-')[2]})"


def render(records: Sequence[Record], format: str) -> str:
    """All groups as md, csv or json text."""
    tables = groups(records)
    if format == "csv":
        frames = [table(g).assign(table=i) for i, g in enumerate(tables)]
        return str(pd.concat(frames, ignore_index=True).to_csv(index=False)) if frames else ""
    if format == "json":
        out = [{"heading": heading(g[0]), "rows": json.loads(table(g).to_json(orient="records"))} for g in tables]
        return json.dumps({"tables": out}, indent=1) + "\n"
    parts = [markdown(g) for g in tables]
    if len(parts) > 1:
        parts.insert(0, "Each table holds only runs on the same images, base, sigma, n0, n and alpha.\n")
    return "\n".join(parts)


def write(records: Sequence[Record], format: str, out: Path, left_out: Sequence[str] = ()) -> list[Path]:
    """The report and, for markdown, its figures: into the folder ``out``, or to the file where it ends in the format.

    A page (html) also names what was ``left_out``. Returns the files written. Raises BenchError where they cannot be.
    """
    report = out if out.suffix == f".{format}" else out / f"report.{format}"
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        if format == "html":
            from bench.html import page  # it builds on this module, and on Plotly, which takes a while to import

            text = page(records, left_out)
        else:
            text = render(records, format)
        files = [report]
        if format == "md":
            for number, group in enumerate(groups(records), 1):
                identity = group[0].identity
                name = f"{identity['dataset']}-s{identity['sigma']:g}" + (f"-{number}" if number > 1 else "")
                name = f"{out.stem}-{name}" if report == out else name
                files += figure(group, report.parent, name)
                text += f"\n![{heading(group[0])}]({name}.svg)\n"
        # A name in a record may be no text at all (half of a surrogate pair); it is shown by its number.
        report.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        raise BenchError(f"cannot write the report to {out}: {e.strerror}; choose another place with --out") from None
    return files
