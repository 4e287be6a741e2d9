"""Where a report is written: its format by the name of a file, the file itself, and its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.io.files import write_text, writing
from bench.report import attacked, text
from bench.report.figures import TRADEOFF, band, curves, tradeoff
from bench.report.rows import Setting
from bench.report.tables import Report
from bench.text import escape

SUFFIXES = {".md": "md", ".tex": "latex", ".csv": "csv", ".json": "json", ".html": "html"}
ALIASES = {".markdown": ".md", ".latex": ".tex", ".htm": ".html"}
UNSUPPORTED = (".txt", ".pdf", ".png", ".svg", ".tsv", ".xlsx", ".parquet")


def format_of(out: Path | None, format: str | None) -> str:
    """Return the format of a report, by its file's name or as given. Raises BenchError where they differ."""
    suffix = out.suffix.lower() if out is not None and not out.is_dir() else ""
    named = SUFFIXES.get(ALIASES.get(suffix, suffix))
    if suffix in UNSUPPORTED:
        raise BenchError(f"--out {out}: a report is written as {', '.join(SUFFIXES)}, or into a folder")
    if named and format and named != format:
        raise BenchError(f"--out {out} is a file of format {named}, --format is {format}; leave one of them out")
    return named or format or "md"


def write(report: Report, format: str, out: Path, left_out: Sequence[str] = (), every: bool = False) -> list[Path]:
    """Write the report and, for markdown and LaTeX, its figures: into the folder ``out``, or to the file it names.

    A page (html) also lists the runs ``left_out``; ``every``: all columns in markdown.

    Returns the files written. Raises BenchError where they cannot be.
    """
    suffix = next(s for s, f in SUFFIXES.items() if f == format)
    named = ALIASES.get(out.suffix.lower(), out.suffix.lower()) == suffix and not out.is_dir()
    file = out / f"report{suffix}" if not named else out
    with writing(f"the report to {out}", "choose another place with --out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if format == "html":
            from bench.report.page import page  # Plotly takes a while to import

            content = page(report, left_out)
        else:
            content = text.render(report, format, every)
        files = [file]
        if format in ("md", "latex"):
            for table in report.tables:
                name = figure_name(table.setting)
                name = f"{out.stem}-{name}" if named else name
                files += [*curves(table, file.parent, name), *tradeoff(table, file.parent, name)]
                bands = band(table, file.parent, name)
                files += bands
                if format == "md":
                    content += f"\n![{escape(table.setting.heading)}]({name}.svg)\n![{TRADEOFF}]({name}-cost.svg)\n"
                    content += f"![{attacked.TITLE}]({name}-attacked.svg)\n" if bands else ""
        write_text(file, content)
    return files


def figure_name(setting: Setting) -> str:
    """Name a table's figures by what its runs have in setting, so that other tables do not change the name."""
    dataset = re.sub(r"[^\w.-]", "-", setting.dataset)  # part of a file's name, from untrusted input
    split = "" if setting.split == "test" else f"-{setting.split}"
    return f"{dataset}{split}-s{setting.sigma:g}-{setting.key[:8]}"
